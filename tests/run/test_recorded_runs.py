"""Runs that were recorded (tests/recorded_runs) by earlier versions, and with both ends of the supported versions of
Megatron-Core, still resume, replay and convert: so each end loads and continues what the other wrote."""

import json
import shutil
from pathlib import Path

import pytest
import recorded_run_worker
import yaml
from launcher import Ranks
from safetensors.torch import load_file

from nft_megatron.config.load import load_config
from nft_megatron.config.renamed import RENAMED
from nft_megatron.observe.metrics import is_wall_clock

RECORDED = Path(__file__).parents[1] / "recorded_runs"
VERSIONS = sorted(path.name for path in RECORDED.iterdir() if path.is_dir() and path.name.startswith("v"))


@pytest.fixture(params=VERSIONS)
def recorded(request, tmp_path) -> Path:
    """A copy of the folder that holds the run, its model, its questions and its configuration."""
    return Path(shutil.copytree(RECORDED / request.param, tmp_path / "recorded"))


def with_names_of_today(folder: Path) -> None:
    """What a user does whose old keys were refused."""
    path = folder / "config.yaml"
    text = path.read_text()
    for old, new in RENAMED.items():
        text = text.replace(old.partition(".")[2], new.partition(".")[2])
    path.write_text(text)


def test_a_killed_run_resumes_asks_nothing_twice_and_trains_what_it_would_have_trained(recorded, tmp_path):
    with_names_of_today(recorded)
    done = Ranks(recorded_run_worker.resume_without_asking, (recorded,), 1, tmp_path).wait()
    assert done.returncode == 0, done.stderr
    *_, row = [json.loads(line) for line in (recorded / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = json.loads((recorded / "expected_step_3.json").read_text())
    for name, value in expected.items():
        if not is_wall_clock(name):
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_a_recorded_step_replays(recorded, tmp_path):
    done = Ranks(recorded_run_worker.in_folder, (recorded, ["replay", "run", "--step", "1"]), 1, tmp_path).wait()
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (recorded / "run" / "metrics.jsonl").read_text().splitlines()]
    table = {words[0]: words[1:] for words in map(str.split, done.stdout.splitlines()) if len(words) == 4}
    for name in ("loss", "loss_positive", "loss_negative", "grad_norm"):
        before, now, _ = table[name]
        assert float(before) == pytest.approx(rows[0][name], rel=1e-5)
        assert float(now) == pytest.approx(rows[0][name], rel=1e-4)


def test_a_checkpoint_converts_to_the_weights_that_were_exported(recorded, tmp_path):
    command = ["convert", "to-hf", "run/checkpoints/step_000002", "converted", "--model", "model"]
    done = Ranks(recorded_run_worker.in_folder, (recorded, command), 1, tmp_path).wait()
    assert done.returncode == 0, done.stderr
    converted, exported = (load_file(recorded / folder / "model.safetensors") for folder in ("converted", "run/hf/step_000002"))
    assert converted.keys() == exported.keys()
    assert all(converted[name].equal(exported[name]) for name in exported)


def test_the_recorded_configuration_is_read_as_if_it_had_been_written_today(recorded):
    tree = yaml.safe_load((recorded / "config.yaml").read_text())
    config = load_config(recorded / "run" / "config.yaml")
    sizes = [tree["rollout"].get(name) for name in ("group_size", "answers_per_question")]  # of today, and before 0.2
    assert config.rollout.group_size == 8
    assert 8 in sizes
    assert (config.rollout.probe_questions, config.rollout.probe_tokens) == (2, 4)
