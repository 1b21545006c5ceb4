"""A hung rank ends within its deadline and reports where it hung."""

import os
import signal
import threading
from pathlib import Path

import pytest
from waiting import until

from nft_megatron.base.rank_info import rank_info
from nft_megatron.config.load import load_config
from nft_megatron.lifecycle.exit_report import read_exit_reports
from nft_megatron.lifecycle.watchdog import LifeSigns, Watchdog
from nft_megatron.run.build import longest_silences


class Recorder:
    """Replaces the progress display and the process's exit."""

    def __init__(self) -> None:
        self.codes, self.advanced = [], 0

    def end(self, code: int) -> None:
        self.codes.append(code)

    def advance(self, count: int) -> None:
        self.advanced += count


class NoBackstop:
    """Replaces the timer that would end the test's process; keeps what it was told."""

    def __init__(self) -> None:
        self.phases, self.seconds = [], []

    def describe(self, phase: str, what: str) -> None:
        self.phases.append((phase, what))

    def arm(self, seconds: float) -> None:
        self.seconds.append(seconds)

    def close(self) -> None:
        self.seconds.append(None)


class Clock:
    """A clock that advances only when a test adds to ``now``."""

    def __init__(self) -> None:
        self.now, self._num_looks = 5000.0, 0

    def __call__(self) -> float:
        self._num_looks += threading.current_thread().name == "watchdog"
        return self.now

    def wait_for_a_look(self) -> None:
        """Wait until the watchdog has read the current time."""
        before = self._num_looks
        until(lambda: self._num_looks >= before + 2)  # the first of them may have started earlier


@pytest.fixture
def watch(tmp_path):
    dogs = []

    def build(**deadlines):
        recorder, clock = Recorder(), Clock()
        recorder.backstop = NoBackstop()
        dogs.append(Watchdog(tmp_path, 3, deadlines, end=recorder.end, clock=clock, backstop=recorder.backstop))
        return dogs[-1], recorder, clock

    yield build
    for dog in dogs:
        dog.close()


def test_a_silent_phase_is_reported_with_the_stacks_of_all_threads(watch, tmp_path, capsys):
    dog, recorder, clock = watch(update=2.0)
    dog.note = "of step 12"

    def the_thread_that_hangs() -> None:
        with dog.phase("update"):
            clock.now += 42
            until(lambda: recorder.codes)

    thread = threading.Thread(target=the_thread_that_hangs)
    thread.start()
    thread.join()
    assert recorder.codes[0] == 70
    report = (tmp_path / "logs" / "stall_rank3.txt").read_text()
    first, _, stacks = report.partition("\n\n")
    assert first == "rank 3 has been silent for 42 s in phase update (allowed by deadlines.update_seconds: 2 s) of step 12"
    assert "the_thread_that_hangs" in stacks and "_watch" in stacks
    assert first in capsys.readouterr().err
    (ending,) = read_exit_reports(tmp_path)
    assert (ending.rank, ending.code, ending.phase) == (rank_info().rank, 70, "update")
    assert ending.message == first


def test_the_backstop_is_armed_behind_the_deadline_and_told_every_phase(watch):
    dog, recorder, clock = watch(update=100.0, save=20.0)
    stop = recorder.backstop
    assert stop.seconds[0] == 130  # no phase yet: the longest deadline, and 30 s in which the watchdog writes its report
    dog.note = "of step 12"
    with dog.phase("update"):
        clock.now += 60
        clock.wait_for_a_look()
        until(lambda: stop.seconds[-1] == 70)
        with dog.phase("save"):
            until(lambda: stop.seconds[-1] == 40)  # 30 s would be more than the deadline itself
        with dog.phase("wait"):
            until(lambda: stop.seconds[-1] == 130)
            clock.now += 1000  # nothing limits this wait, but Python code must run
            clock.wait_for_a_look()
            assert stop.seconds[-1] == 130
    assert [phase for phase, _ in stop.phases] == ["update", "save", "update", "wait", "update"]
    _, save, _, wait, _ = (what.partition(":")[0] for _, what in stop.phases)
    assert save == "ran no Python code for 20 s (deadlines.save_seconds) in phase save of step 12"
    assert wait == "ran no Python code for 100 s (the longest of deadlines) in phase wait of step 12"
    assert recorder.codes == []
    dog.close()
    assert stop.seconds[-1] is None


def test_signs_of_life_and_phases_without_a_deadline_keep_the_watchdog_quiet(watch):
    dog, recorder, clock = watch(collect=1.0)
    shown = LifeSigns(recorder, dog)
    with dog.phase("collect"):
        for _ in range(3):
            clock.now += 0.9
            clock.wait_for_a_look()
            shown.advance(2)
        with dog.phase("something else"):
            clock.now += 100
            clock.wait_for_a_look()
        clock.now += 0.9  # time inside the nested phase does not count
        clock.wait_for_a_look()
    clock.now += 100
    with dog.phase("collect"):
        clock.wait_for_a_look()
    assert recorder.codes == []
    assert recorder.advanced == 6


def test_a_wait_for_servers_ends_before_the_watchdog_does(run_config):
    deadlines = {"publish_seconds": 100.0, "collect_seconds": 200.0, "evaluate_seconds": 300.0, "update_seconds": 400.0}
    embedded = load_config(run_config(deadlines=deadlines, fleet={"wait_seconds": 5000.0}))
    silences = longest_silences(embedded)
    assert [silences[name] for name in ("publish", "collect", "evaluate", "update")] == [100, 200, 300, 400]
    fleet = load_config(run_config(deadlines=deadlines, fleet={"wait_seconds": 5000.0}, rollout={"engine": "vllm"}))
    longer = {"publish": 5100, "collect": 5200, "evaluate": 5300}
    assert longest_silences(fleet) == silences | longer


def test_a_stopped_rank_ends_the_run_with_the_phase_named(run_config, start, metrics_of, tmp_path):
    """Rank 1 is stopped (SIGSTOP) during training: rank 0 waits for it in a collective and reports that."""
    config = run_config(
        train={"num_steps": 500},
        checkpoint={"every": 1000},
        parallel={"timeout_seconds": 600.0},
        deadlines=dict.fromkeys(
            [f"{name}_seconds" for name in ("update", "publish", "save", "collect", "evaluate", "other")], 8.0
        ),
        rollout={"step_deadline_seconds": 600.0},
        evaluate={"data": []},
    )
    process, run = start("train", config, ranks=2), tmp_path / "run"
    until(lambda: (run / "metrics.jsonl").exists() and metrics_of(run))
    process.processes[1].join(0.37)
    os.kill(process.processes[1].pid, signal.SIGSTOP)
    process.processes[0].join(240)
    assert process.processes[0].exitcode == 70
    report = Path(run / "logs" / "stall_rank0.txt").read_text()
    assert report.startswith("rank 0 has been silent for ") and "_seconds: 8 s)" in report.partition("\n")[0]
    (ending,) = read_exit_reports(run)
    assert (ending.rank, ending.code) == (0, 70) and f"in phase {ending.phase} " in report
    assert "nft_megatron/run.py" in report or "nft_megatron/train.py" in report
