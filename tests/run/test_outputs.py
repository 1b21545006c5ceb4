"""A run whose standard output or error fails trains as any other."""

import json

import pytest
from launcher import Ranks
from output_worker import main_with

SECTIONS = {"train": {"num_steps": 2}}


@pytest.mark.parametrize(
    ("out", "err", "said"),
    [
        ("closed", "kept", "standard output: is closed; the run continues without its display"),
        ("full", "kept", "standard output: No space left on device; the run continues without its display"),
        ("pipe", "kept", "standard output: Broken pipe; the run continues without its display"),
        ("ascii", "ascii", ""),
        ("kept", "full", ""),
        ("pipe", "pipe", ""),
        ("closed", "closed", ""),
    ],
)
def test_a_run_outlives_its_output(run_config, run_once, metrics_of, tmp_path, out, err, said):
    config = run_config("broken", **SECTIONS)
    ended = Ranks(main_with, (out, err, ["train", str(config)]), 1, tmp_path).wait()
    assert ended.returncode == 0, ended.stderr
    assert metrics_of(tmp_path / "broken") == metrics_of(run_once(**SECTIONS))
    assert ended.stderr.count("nft-megatron: standard output") == bool(said)
    assert said in ended.stderr
    if out in ("kept", "ascii"):
        assert "step 2/2" in ended.stdout


@pytest.mark.parametrize("kind", ["full", "pipe"])
def test_a_run_that_stops_early_keeps_its_exit_code(run_config, tmp_path, kind):
    config = run_config("asked", **SECTIONS)
    (tmp_path / "asked").mkdir()
    (tmp_path / "asked" / "stop").touch()
    ended = Ranks(main_with, (kind, kind, ["train", str(config)]), 1, tmp_path).wait()
    assert ended.returncode == 75
    assert json.loads((tmp_path / "asked" / "logs" / "end_rank0.json").read_text())["code"] == 75
