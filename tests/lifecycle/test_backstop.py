"""C code that holds the interpreter's lock stops every Python thread; the process still ends, and says where."""

import json
import subprocess
import sys
import time

import pytest

from nft_megatron.base.run_folder import RunFolder
from nft_megatron.lifecycle.backstop import Backstop
from nft_megatron.lifecycle.exit_report import ExitReport, read_exit_reports, write_exit_report
from nft_megatron.slurm.cause import find_cause

HOLDER = """
import ctypes, sys
from pathlib import Path
from nft_megatron.lifecycle.watchdog import Watchdog

def the_library_that_hangs():
    ctypes.PyDLL(None).sleep(600)  # unlike CDLL, PyDLL keeps the lock

dog = Watchdog(Path(sys.argv[1]), int(sys.argv[2]), {"update": 0.4})
dog.note = "of step 12"
with dog.phase("update"):
    if sys.argv[3] == "update":
        the_library_that_hangs()
    with dog.phase(sys.argv[3]):
        the_library_that_hangs()
"""


def hold(run_dir, rank, phase):
    program = [sys.executable, "-c", HOLDER, run_dir, str(rank), phase]
    return subprocess.run(program, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(("rank", "phase"), [(0, "update"), (3, "update"), (3, "wait")])
def test_a_stall_that_holds_the_lock_ends_with_phase_rank_and_stacks(tmp_path, rank, phase):
    (tmp_path / "logs").mkdir()
    began = time.time()
    ended = hold(tmp_path, rank, phase)
    assert ended.returncode == 1
    head, _, stacks = (tmp_path / "logs" / f"phase_rank{rank}.txt").read_text().partition("\n")
    limit = "deadlines.update_seconds" if phase == "update" else "the longest of deadlines"
    message = (
        f"rank {rank} ran no Python code for 0.4 s ({limit}) in phase {phase} of step 12: C code held the interpreter's lock; "
        f"the stacks of its threads are in logs/phase_rank{rank}.txt"
    )
    assert json.loads(head)["message"] == message
    assert "the_library_that_hangs" in stacks and "_watch" in stacks
    (report,) = read_exit_reports(tmp_path)
    assert (report.code, report.phase, report.message, report.is_frozen) == (70, phase, message, True)
    assert began - 1 < report.time < time.time() + 1  # when it ended, not when the phase began
    stop = Backstop(tmp_path, rank)
    stop.describe("setup", "begins again")
    assert read_exit_reports(tmp_path) == []
    stop.close()


def test_before_a_run_has_a_folder_the_stacks_go_to_standard_error(tmp_path):
    ended = hold(tmp_path / "run", 0, "update")
    assert ended.returncode == 1
    assert "the_library_that_hangs" in ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_rank_that_ended_otherwise_leaves_no_report_of_a_stall(tmp_path):
    (tmp_path / "logs").mkdir()
    path = RunFolder(tmp_path).phase(2)
    stop = Backstop(tmp_path, 2)
    for phase in ("a long name of a phase " * 100, "update"):
        stop.describe(phase, "hangs")
        assert path.stat().st_size == 1024
    assert json.loads(path.read_text())["phase"] == "update"
    assert read_exit_reports(tmp_path) == []  # as after SIGKILL
    second = Backstop(tmp_path, 2)  # of a start that will find the run folder taken
    second.describe("setup", "hangs")
    second.close()
    assert json.loads(path.read_text())["phase"] == "update"
    stop.close()
    assert not path.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        "[]",
        "5",
        "{}",
        '{"rank": "x"}',
        '{"rank": 1, "host": 2, "code": 70, "message": "m", "phase": "p", "time": "now"}',
        '{"rank": 1, "host": "n", "code": 70, "message": "m", "phase": ["p"], "time": 1}',
    ],
)
def test_reports_that_are_none_are_passed_over(tmp_path, text):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "end_rank0.json").write_text(text)
    (tmp_path / "logs" / "phase_rank1.txt").write_text(f"{text}\nThread 0x1\n")
    write_exit_report(tmp_path, ExitReport(5, "n3", 1, "a fault", None, 7.0))
    assert [report.message for report in read_exit_reports(tmp_path)] == ["a fault"]


def test_slurms_agent_takes_it_for_a_hang_of_that_rank_and_not_for_an_echo():
    nodes = ["n1", "n1", "n2", "n2"]
    frozen = ExitReport(2, "n2", 70, "rank 2 ran no Python code for 1800 s", "update", 12.0, is_frozen=True)
    echoes = [ExitReport(rank, nodes[rank], 1, "RuntimeError: Connection closed by peer", "update", 12.5) for rank in (0, 1, 3)]
    log = "srun: error: n2: task 2: Exited with exit code 1\nsrun: error: n1: tasks 0-1: Exited with exit code 1\n"
    cause = find_cause(1, [frozen, *echoes], log, nodes)
    assert (cause.code, cause.blamed) == (70, ("n2",))
    assert cause.text == "rank 2 ran no Python code for 1800 s (on n2)"
    alone = find_cause(1, [ExitReport(0, "n1", 70, "rank 0 ran no Python code", "save", 1.0, is_frozen=True)], "", ["n1"])
    assert (alone.code, alone.blamed) == (70, ("n1",))
