"""A run whose job is about to end, one that is asked to save and continue, one whose updates are not finite."""

import json
import random
import re
import time
from pathlib import Path

import pytest
from faults import train_in_environment, train_with_infinite_loss, train_with_ticks
from launcher import Ranks
from waiting import until

from nft_megatron.base.errors import UserError
from nft_megatron.lifecycle.exit_report import read_exit_reports
from nft_megatron.lifecycle.walltime import TimeLimit


class Clock:
    now = 5000.0

    def __call__(self) -> float:
        return self.now


def test_what_is_needed_is_the_longest_of_the_last_five_with_a_margin():
    clock, seconds = Clock(), random.Random(0)
    limit = TimeLimit(6000.0, reserve=60.0, clock=clock)
    limit.phases = ("update", "checkpoint")
    assert limit.needed == 60.0
    taken = []
    for _ in range(20):
        with limit.measuring("update"):
            taken.append(round(seconds.uniform(1, 100)))
            clock.now += taken[-1]
        limit.measured("publish", 1e6)  # not among the phases
        clock.now = 5000.0
        assert limit.needed == 60.0 + 1.25 * max(taken[-5:])
    limit.measured("checkpoint", 40.0)
    assert limit.needed == 60.0 + 1.25 * (max(taken[-5:]) + 40.0)
    clock.now = 6000.0 - limit.needed
    assert limit.reason() is None
    clock.now += 0.01
    assert limit.reason().startswith("the end of its time: ")


def test_a_phase_that_fails_is_not_measured():
    clock = Clock()
    limit = TimeLimit(6000.0, reserve=60.0, clock=clock)
    limit.phases = ("update",)
    with pytest.raises(KeyError), limit.measuring("update"):
        clock.now += 500
        raise KeyError
    assert limit.needed == 60.0


def test_the_end_is_what_the_agent_says_else_slurm_else_never(monkeypatch):
    for name in ("NFT_MEGATRON_END_TIME", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    assert TimeLimit.of_job(1e12).reason() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1000))
    assert TimeLimit.of_job(900.0).reason() is None
    assert TimeLimit.of_job(1100.0).reason() is not None
    monkeypatch.setenv("NFT_MEGATRON_END_TIME", str(int(time.time()) + 2000))
    assert TimeLimit.of_job(1100.0).reason() is None


@pytest.mark.parametrize("end", ["0", "1600000000", "-1"])
def test_an_end_in_the_past_is_another_jobs(monkeypatch, caplog, end):
    """A shell may outlive the job whose variables it has; and 0 stands for no limit."""
    monkeypatch.delenv("NFT_MEGATRON_END_TIME", raising=False)
    monkeypatch.setenv("SLURM_JOB_END_TIME", end)
    assert TimeLimit.of_job(60.0).reason() is None
    assert f"SLURM_JOB_END_TIME = {end} is long past: ignored, as no job outlives its end; unset it" in caplog.text
    monkeypatch.setenv("NFT_MEGATRON_END_TIME", end)  # the agent's, or a person's own
    assert re.match(r"the end of its time, \d+ s ago \(by NFT_MEGATRON_END_TIME", TimeLimit.of_job(60.0).reason())


def test_a_job_that_is_just_being_ended_leaves(monkeypatch):
    monkeypatch.delenv("NFT_MEGATRON_END_TIME", raising=False)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) - 5))
    assert re.match(r"the end of its time, \d+ s ago", TimeLimit.of_job(60.0).reason())


@pytest.mark.parametrize("end", ["soon", "nan", "2026-01-01T00:00:00"])
@pytest.mark.parametrize("name", ["NFT_MEGATRON_END_TIME", "SLURM_JOB_END_TIME"])
def test_what_is_no_time_is_refused(monkeypatch, name, end):
    monkeypatch.delenv("NFT_MEGATRON_END_TIME", raising=False)
    monkeypatch.setenv(name, end)
    with pytest.raises(UserError, match=f"{name} = {end}: is not a time; give seconds since 1970, or unset it"):
        TimeLimit.of_job(1.0)


@pytest.mark.parametrize("end", [30.0, 37.0])
def test_a_run_in_pieces_of_limited_time_equals_an_uninterrupted_one(run_config, run_once, metrics_of, tmp_path, end):
    """Each piece ends by its limit with 75, between steps or within the collecting of one. The clock ticks with every look."""
    sections = {"train": {"num_steps": 6}, "checkpoint": {"every": 100}}
    whole = run_once(**sections)
    config, run = run_config("limited", **sections), tmp_path / "limited"
    codes, steps = [], []
    while not codes or codes[-1] == 75:
        output = tmp_path / f"output{len(codes)}"
        output.mkdir()
        outcome = Ranks(train_with_ticks, (str(config), end), 1, output).wait()
        codes.append(outcome.returncode)
        assert codes[-1] in (0, 75) and len(codes) < 10, outcome.stderr
        steps.append(int((run / "checkpoints" / "latest").read_text().removeprefix("step_")))
        if codes[-1] == 75:
            assert "by the end of its time" in outcome.stderr
            assert "by the end of its time" in read_exit_reports(run)[0].message
    assert len(codes) >= 2 and steps == sorted(set(steps)), steps
    assert metrics_of(run) == metrics_of(whole)


def test_too_short_a_job_leaves_before_the_first_updates(run_config, tmp_path):
    variables = {"SLURM_JOB_END_TIME": str(int(time.time()) + 30)}  # less than deadlines.leave_seconds
    outcome = Ranks(train_in_environment, (str(run_config()), variables), 2, tmp_path).wait()
    assert outcome.returncode == 75, outcome.stderr
    assert "step 1 by the end of its time" in outcome.stderr
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()


def test_save_and_continue(run_config, start, tmp_path):
    run = tmp_path / "run"
    process = start("train", run_config(train={"num_steps": 1_000_000}, checkpoint={"every": 1000}), ranks=2)
    until((run / "metrics.jsonl").exists, process=process)
    (run / "save").touch()
    until(lambda: not (run / "save").exists(), process=process)
    saved = int((run / "checkpoints" / "latest").read_text().removeprefix("step_"))
    assert (run / "checkpoints" / f"step_{saved:06d}" / "checksums.json").exists()
    # It continues.
    until(lambda: len((run / "metrics.jsonl").read_text().splitlines()) >= saved + 2, process=process)


def skipped(run: Path) -> list[int]:
    return [json.loads(line)["skipped_updates"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_fewer_updates_that_are_not_finite_than_allowed_are_skipped(run_config, tmp_path):
    """Two updates a step: the second of step 1 and the first of step 2, then the first of step 3 alone."""
    outcome = Ranks(train_with_infinite_loss, (str(run_config()), 2, 3, 5), 1, tmp_path).wait()
    assert outcome.returncode == 0, outcome.stderr
    assert skipped(tmp_path / "run") == [1, 1, 1]
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["updates"] == 3


def test_too_many_in_a_row_end_the_run_without_another_checkpoint(run_config, tmp_path):
    outcome = Ranks(train_with_infinite_loss, (str(run_config()), 2, 3, 4), 2, tmp_path).wait()
    assert outcome.returncode == 1
    (end, other) = read_exit_reports(tmp_path / "run")
    assert end.message.startswith("RuntimeError: update 2 of step 2: the loss is inf; 3 updates in a row")
    assert end.phase == "update" and other.message == end.message
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_000001"
    assert skipped(tmp_path / "run") == [1]
