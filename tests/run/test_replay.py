"""Replay of a recorded step: bit for bit under its own layout, to rounding under others, and under another algorithm."""

import hashlib
import json
import re

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

STEPS = 3


@pytest.fixture
def recorded(run_once):
    """A run whose weights have moved away from those that answered: several updates a step, of a rate that is felt."""
    return run_once(
        train={"num_steps": STEPS, "updates_per_step": 4}, checkpoint={"every": 1, "keep": STEPS}, evaluate={"data": []}
    )


def fingerprint(folder):
    """Everything in a folder: names, bytes and times."""
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


def table(output: str) -> dict[str, tuple[float, float]]:
    """The printed metrics: before and now."""
    lines = [line.split() for line in output.splitlines()]
    return {words[0]: (float(words[1]), float(words[2])) for words in lines if len(words) == 4 and words[0] != "metric"}


def replayed(command, run, step, *arguments, ranks=1):
    done = command("replay", run, "--step", step, *arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_own_layout_repeats_every_step_to_the_bit_and_leaves_the_run_alone(recorded, command):
    before = fingerprint(recorded)
    rows = [json.loads(line) for line in (recorded / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        output = replayed(command, recorded, row["step"])
        assert output.splitlines()[-1] == "bit-identical"
        measured = table(output)
        for name in ("loss", "loss_positive", "loss_negative", "grad_norm", "kl_old", "ratio_max", "entropy", "clamp_rate"):
            assert measured[name] == (row[name], row[name])
        assert row["loss_positive"] != 0 != row["loss_negative"]
    assert fingerprint(recorded) == before


@pytest.fixture
def of_step_2(recorded, command, runs_of_the_session):
    """The saved replay of step 2, by one process."""
    path = runs_of_the_session / "step 2.safetensors"
    if not path.exists():
        replayed(command, recorded, 2, "--save", path)
    return path


@pytest.mark.parametrize("override", ["parallel.tensor=2", "parallel.context=2", "parallel.pipeline=2", "parallel.tensor=1"])
def test_other_layouts_differ_by_rounding(recorded, of_step_2, command, override):
    """Losses of the step, and the first gradient; two processes that share nothing are data parallel."""
    output = replayed(command, recorded, 2, "--against", of_step_2, override, ranks=2)
    measured = table(output)
    scale = sum(abs(measured[name][0]) for name in ("loss_positive", "loss_negative"))
    for name in ("loss", "loss_positive", "loss_negative"):
        assert abs(measured[name][0] - measured[name][1]) < 1e-5 * scale
    assert measured["grad_norm"][1] == pytest.approx(measured["grad_norm"][0], rel=1e-5)
    assert float(re.search(r"\|difference\| / \|before\| = (\S+)", output)[1]) < 1e-5


def test_another_algorithm_starts_from_its_own_defaults_and_differs(recorded, of_step_2, command, tmp_path):
    """On-policy the first gradient of NFT with ω = 1 − r̂ is Dr. GRPO's, and not GRPO's."""
    other = tmp_path / "dr_grpo.safetensors"
    same = replayed(command, recorded, 2, "--against", of_step_2, "--save", other, "algorithm.name=dr_grpo")
    assert float(re.search(r"\|before\| = (\S+)", same)[1]) < 1e-6
    different = replayed(command, recorded, 2, "--against", of_step_2, "algorithm.name=grpo", "algorithm.clip_high=0.2")
    assert float(re.search(r"\|before\| = (\S+)", different)[1]) > 0.1
    assert load_file(other).keys() == load_file(of_step_2).keys()
    with safe_open(other, framework="pt") as file:
        metrics = json.loads(file.metadata()["nft_megatron.metrics"])
    assert table(same)["loss"] == (table(different)["loss"][0], metrics["loss"])


def test_answers_of_a_question_stay_together_where_the_algorithm_asks(recorded, command):
    budget = "train.micro_batch_tokens=96"
    assert "infonca" in replayed(command, recorded, 1, "algorithm.name=infonca", budget)


def test_what_cannot_be_replayed_is_said(recorded, command, tmp_path):
    for arguments, message in (
        ((recorded, "--step", 9), "--step = 9: has no ledger; one of 1, 2, 3"),
        ((tmp_path, "--step", 1), "is not a run folder"),
        ((recorded, "--step", 1, "--against", recorded / "config.yaml"), "is not a saved replay"),
        ((recorded, "--step", 1, "algorithm.name=ppo"), "no such algorithm"),
    ):
        done = command("replay", *arguments)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
