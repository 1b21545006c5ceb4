"""The exit report of a rank, for every way to exit except the watchdog's (test_watchdog.py)."""

import os
import shutil
import signal
import socket
import time

import pytest
from faults import train_with_broken_update
from launcher import Ranks
from waiting import until

from nft_megatron.base import run_folder
from nft_megatron.base.run_folder import RunFolder, RunFolderTakenError
from nft_megatron.lifecycle import exit_report
from nft_megatron.lifecycle.exit_report import ExitReport, read_exit_reports, write_exit_report


def wait_for_a_step(process, run, count: int = 1) -> None:
    rows = run / "metrics.jsonl"
    until(lambda: rows.exists() and len(rows.read_text().splitlines()) >= count, process=process)


def test_every_rank_says_that_it_stopped_early_and_the_next_start_forgets_it(run_config, start, command, tmp_path):
    config, run, begin = run_config(train={"num_steps": 1_000_000}), tmp_path / "run", time.time()
    process = start("train", config, ranks=2)
    wait_for_a_step(process, run)
    process.signal(signal.SIGTERM)
    process.wait()
    reports = {each.rank: each for each in read_exit_reports(run)}
    assert reports.keys() == {0, 1}
    for each in reports.values():
        assert each.code == 75 and "by SIGTERM" in each.message and begin < each.time < time.time()
    assert (run / "logs" / "end_rank1.json").exists()
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    assert command("train", config, f"train.num_steps={steps + 1}", ranks=2).returncode == 0
    assert read_exit_reports(run) == []


def test_the_host_is_what_slurm_calls_the_node(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert ExitReport.here(1, "a fault").host == "n7"
    monkeypatch.delenv("SLURMD_NODENAME")
    assert ExitReport.here(1, "a fault").host == socket.gethostname()


def test_wrong_input_and_an_interruption(run_config, start, command, tmp_path):
    assert command("train", run_config(train={"num_steps": 2})).returncode == 0
    assert command("train", run_config(), "train.num_steps=1").returncode == 2
    (end,) = read_exit_reports(tmp_path / "run")
    assert end.code == 2 and "has already finished 2 steps" in end.message and end.phase == "setup"
    process = start("train", run_config(train={"num_steps": 1_000_000}, checkpoint={"every": 1000}))
    wait_for_a_step(process, tmp_path / "run", 3)
    process.signal(signal.SIGINT)
    process.signal(signal.SIGINT)
    if (outcome := process.wait()).returncode == 130:  # 75 where the step was over between the two
        (end,) = read_exit_reports(tmp_path / "run")
        assert end.code == 130 and end.message.startswith("interrupted"), outcome.stderr


def test_a_fault_names_its_phase(run_config, tmp_path):
    Ranks(train_with_broken_update, (str(run_config()),), 1, tmp_path).wait()
    (end,) = read_exit_reports(tmp_path / "run")
    assert (end.code, end.message, end.phase) == (1, "RuntimeError: the second update broke", "update")


def test_who_is_kept_out_leaves_nothing_in_the_folder_of_another(run_config, start, command, tmp_path):
    config = run_config(train={"num_steps": 1_000_000})
    process = start("train", config)
    wait_for_a_step(process, tmp_path / "run")
    assert command("train", config).returncode == 2
    assert process.is_running and read_exit_reports(tmp_path / "run") == []


def test_an_attempt_waits_for_the_lock_of_the_one_before(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    held = folder.open()
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.time, "sleep", lambda _: held.close())  # while it waits
        folder.open(wait_seconds=30.0).close()
    assert held.closed
    with folder.open(), pytest.raises(RunFolderTakenError):
        folder.open(wait_seconds=0.1)


def test_unreadable_files_are_left_out(tmp_path):
    write_exit_report(tmp_path, ExitReport(3, "n1", 70, "hung", "update", 5.0))
    (tmp_path / "logs" / "end_rank1.json").write_text('{"rank": 1, "ho')
    (tmp_path / "logs" / "end_rank2.json").write_text('{"rank": 2, "surprise": true}')
    assert [each.rank for each in read_exit_reports(tmp_path)] == [3]


@pytest.mark.parametrize("what", ["gone", "not a folder", "silent"])
def test_an_unreachable_folder_blocks_nobody(tmp_path, monkeypatch, what):
    monkeypatch.setattr(exit_report, "_LONGEST_WRITE", 0.2)
    run = tmp_path / "run"
    if what == "not a folder":
        run.write_text("")
    if what == "silent":
        (run / "logs").mkdir(parents=True)
        monkeypatch.setattr(exit_report.json, "dumps", lambda _: time.sleep(3600))
    write_exit_report(run, ExitReport.here(1, "a fault"))
    assert read_exit_reports(run) == []
    assert os.path.exists(run) == (what != "gone")


@pytest.mark.slow
def test_a_run_folder_that_goes_away_ends_the_run_with_75(run_config, run_once, start, command, metrics_of, tmp_path):
    sections = {"train": {"num_steps": 12}, "checkpoint": {"every": 2}, "evaluate": {"data": []}}
    whole = run_once(ranks=2, **sections)
    config, run = run_config(**sections), tmp_path / "run"
    process = start("train", config, ranks=2)
    wait_for_a_step(process, run, 3)
    run.rename(tmp_path / "elsewhere")
    outcome = process.wait()
    assert [each.exitcode for each in process.processes] == [75, 75], outcome.stderr
    assert "the same command" in outcome.stderr and "Traceback" not in outcome.stderr
    shutil.rmtree(run, ignore_errors=True)  # what was written meanwhile: below a mount nobody would see it again
    (tmp_path / "elsewhere").rename(run)
    done = command("train", config, ranks=2)
    assert done.returncode == 0, done.stderr
    assert metrics_of(run) == metrics_of(whole)
