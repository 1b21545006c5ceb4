"""Which checkpoint a run resumes from, and what exists while one is being written."""

import errno
import json
import shutil
import signal
from pathlib import Path

import pytest
from faults import train_with_slow_writer
from launcher import Ranks
from waiting import until


@pytest.fixture
def damaged_run(run_config, run_once, metrics_of, tmp_path):
    """The config of a run of 4 steps with checkpoints 2 to 4, and the metrics of one of 5 that nothing disturbed."""
    keep = {"checkpoint": {"keep": 3}}
    shutil.copytree(run_once(train={"num_steps": 4}, **keep), tmp_path / "run")
    return run_config(train={"num_steps": 5}, **keep), metrics_of(run_once(train={"num_steps": 5}, **keep))


def truncate(folder: Path) -> None:
    with (folder / "__0_0.distcp").open("r+b") as file:
        file.truncate(1000)


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "__0_0.distcp").write_bytes(content)


def delete_half(folder: Path) -> None:
    for path in sorted(folder.iterdir())[::2]:
        path.unlink()


def damage_collector(folder: Path) -> None:
    (folder / "collector.parquet").write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, delete_half, damage_collector, shutil.rmtree])
def test_a_damaged_newest_checkpoint_is_stepped_over_loudly(damaged_run, command, metrics_of, tmp_path, damage):
    config, undisturbed = damaged_run
    run = tmp_path / "run"
    damage(run / "checkpoints" / "step_000004")
    done = command("train", config)
    assert done.returncode == 0, done.stderr
    assert "trying the previous checkpoint" in done.stderr and "step_000004" in done.stderr
    assert metrics_of(run) == undisturbed, "steps 4 and 5 as if nothing had happened"
    assert (run / "checkpoints" / "latest").read_text() == "step_000005"


def test_the_newest_good_one_is_taken_however_far_back(damaged_run, command, metrics_of, tmp_path):
    config, undisturbed = damaged_run
    for step, damage in ((4, truncate), (3, flip_a_bit)):
        damage(tmp_path / "run" / "checkpoints" / f"step_{step:06d}")
    done = command("train", config, ranks=1)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("trying the previous checkpoint") == 2
    assert metrics_of(tmp_path / "run") == undisturbed


def test_without_any_good_checkpoint_the_run_is_refused(damaged_run, command, tmp_path):
    config, _ = damaged_run
    for step in (2, 3, 4):
        truncate(tmp_path / "run" / "checkpoints" / f"step_{step:06d}")
    before = set((tmp_path / "run").rglob("*"))
    done = command("train", config)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("nft-megatron: ")]
    assert "step_000004: __0_0.distcp is damaged" in line
    assert before <= set((tmp_path / "run").rglob("*")), "nothing is lost"


def latest(run: Path) -> int:
    return int((run / "checkpoints" / "latest").read_text().removeprefix("step_"))


def rows(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def start_slow(config: Path, tmp_path: Path, name: str, *, ranks: int = 2, **fault) -> Ranks:
    (tmp_path / name).mkdir()
    return Ranks(train_with_slow_writer, (str(config), str(tmp_path / "continue"), fault), ranks, tmp_path / name)


@pytest.mark.parametrize("parallel", [{}, pytest.param({"tensor": 2}, marks=pytest.mark.slow)], ids=str)
def test_killed_while_a_checkpoint_is_written_in_the_background_it_resumes_from_the_previous_one(
    run_config, run_once, command, metrics_of, tmp_path, parallel
):
    """The writer of step 2 waits until a file is there; meanwhile steps 3 and 4 are trained."""
    sections = {"train": {"num_steps": 5}, "checkpoint": {"every": 2, "keep": 1}, "parallel": parallel}
    sections["evaluate"] = {"data": []}  # else the row of a last step differs from that of any other
    whole = run_once(ranks=2, **sections)
    config, run = run_config("killed", **sections), tmp_path / "killed"
    assert command("train", config, "train.num_steps=1", ranks=2).returncode == 0
    process = start_slow(config, tmp_path, "first")
    until(lambda: len(rows(run)) == 4, process=process)
    assert latest(run) == 1 and not (run / "checkpoints" / "step_000002").exists()
    assert list((run / "checkpoints").glob(".tmp-*"))
    process.signal(signal.SIGKILL)
    process.wait()
    done = command("train", config, ranks=2)
    assert done.returncode == 0, done.stderr
    assert metrics_of(run) == metrics_of(whole)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_000005"]
    assert not list(run.rglob(".tmp-*"))


def test_what_is_written_aside_is_the_state_of_its_step(run_config, run_once, command, metrics_of, tmp_path):
    """Steps 3 and 4 are trained before the first byte of step 2 is written; then the run resumes from that checkpoint."""
    sections = {"train": {"num_steps": 4}, "checkpoint": {"every": 2}}
    whole = run_once(ranks=2, **sections)
    config, run = run_config("aside", **sections), tmp_path / "aside"
    process = start_slow(config, tmp_path, "first")
    until(lambda: len(rows(run)) == 4, process=process)
    (tmp_path / "continue").touch()
    assert process.wait().returncode == 0
    assert latest(run) == 4
    shutil.rmtree(run / "checkpoints" / "step_000004")
    (run / "checkpoints" / "latest").write_text("step_000002")
    done = command("train", config, ranks=2)
    assert done.returncode == 0, done.stderr
    assert metrics_of(run) == metrics_of(whole)


def test_a_stop_request_waits_for_what_is_being_written(run_config, command, metrics_of, tmp_path):
    config, run = run_config(train={"num_steps": 1_000_000}, checkpoint={"every": 2}), tmp_path / "run"
    process = start_slow(config, tmp_path, "first")
    until(lambda: len(rows(run)) >= 3, process=process)
    (run / "stop").touch()
    (tmp_path / "continue").touch()
    assert process.wait().returncode == 75
    assert latest(run) == len(rows(run)) and not list(run.rglob(".tmp-*"))


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_disk_that_fills_while_a_checkpoint_is_written_ends_the_run_with_the_old_one_whole(
    run_config, run_once, command, metrics_of, tmp_path, asynchronous
):
    """Rank 1 cannot write the checkpoint of step 3."""
    sections = {"train": {"num_steps": 6}, "checkpoint": {"keep": 1, "asynchronous": asynchronous}}
    whole = run_once(ranks=2, **sections)
    config, run = run_config("full", **sections), tmp_path / "full"
    (tmp_path / "continue").touch()
    process = start_slow(config, tmp_path, "first", rank=1, step=3, errno=errno.ENOSPC)
    outcome = process.wait()
    assert [each.exitcode for each in process.processes] == [75, 75], outcome.stderr
    assert "No space left on device while saving a checkpoint" in outcome.stderr and "Traceback" not in outcome.stderr
    assert latest(run) == 2 and not list(run.rglob(".tmp-*"))
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == ["step_000002"]
    done = command("train", config, ranks=2)
    assert done.returncode == 0, done.stderr
    assert metrics_of(run) == metrics_of(whole)


def test_a_fault_of_training_leaves_time_for_what_is_being_written(run_config, tmp_path):
    """The second step's first update breaks while the checkpoint of step 1 waits to be written."""
    config, run = run_config(), tmp_path / "run"
    process = start_slow(config, tmp_path, "first", ranks=1, broken_update=3)
    until(lambda: list((run / "checkpoints").glob(".tmp-*")), process=process)
    (tmp_path / "continue").touch()
    assert process.wait().returncode == 1
    assert latest(run) == 1 and not list(run.rglob(".tmp-*"))
