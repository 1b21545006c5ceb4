"""A busy machine changes no verdict: processor time decides, and what looks stuck is tried once more alone."""

import os
import signal
import subprocess
import sys
import threading
from collections import Counter

import pytest
from grader_processes import workers_of
from waiting import until

from nft_megatron.base.records import Verdict
from nft_megatron.config.sections import VerifyConfig
from nft_megatron.verify import service
from nft_megatron.verify.comparison import Undecided
from nft_megatron.verify.reasons import verdict
from nft_megatron.verify.service import Verifier
from nft_megatron.verify.turns import Turns

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")


class Grader:
    """In the place of a worker process; does what ``script`` says of a task, by its gold."""

    script: "Script"

    def __init__(self, *_: object) -> None:
        self.num_tasks, self.is_alive = 0, True

    def judge(self, task: Undecided, seconds: float) -> Verdict:
        result = self.script.play(task.gold, seconds)
        self.is_alive = result.label != "unknown"
        return result

    def kill(self) -> None:
        self.is_alive = False

    close = kill


class Script:
    """Reasons for each gold, one an attempt. An attempt at a gold of ``held`` lasts until the event is set."""

    def __init__(self, reasons: dict[str, list[str]], held: dict[str, threading.Event]) -> None:
        self.reasons, self.held = reasons, held
        self.attempts: list[tuple[str, float, frozenset[str]]] = []  # gold, limit, what ran when it began
        self._running: set[str] = set()
        self._lock = threading.Lock()

    def play(self, gold: str, seconds: float) -> Verdict:
        with self._lock:
            self._running.add(gold)
            self.attempts.append((gold, seconds, frozenset(self._running)))
            reason = self.reasons[gold].pop(0)
        if gold in self.held:
            assert self.held[gold].wait(60)
        with self._lock:
            self._running.discard(gold)
        return verdict(reason, "")

    def num_attempts(self, gold: str) -> int:
        return [name for name, _, _ in self.attempts].count(gold)


@pytest.mark.parametrize(
    ("lost", "again", "label"),
    [
        ("hard limit", "equal", "correct"),
        ("hard limit", "not equal", "wrong"),
        ("worker died", "equal", "correct"),
        ("worker did not start", "equal", "correct"),
        ("hard limit", "hard limit", "unknown"),
        ("hard limit", "soft limit", "unknown"),
    ],
)
def test_a_task_that_lost_its_worker_is_tried_once_more_alone(
    monkeypatch: pytest.MonkeyPatch, lost: str, again: str, label: str
) -> None:
    done = threading.Event()
    script = Script({"long": ["equal"], "lost": [lost, again], "later": ["equal"]}, held={"long": done})
    monkeypatch.setattr(Grader, "script", script, raising=False)
    monkeypatch.setattr(service, "Worker", Grader)
    with Verifier(VerifyConfig(mode="math-verify", workers=3, hard_seconds=4.0)) as verifier:
        long = verifier.submit("an answer", "long", "stop")
        until(lambda: script.num_attempts("long") == 1)
        tried = verifier.submit("an answer", "lost", "stop")
        until(lambda: verifier._turns.num_waiting_alone == 1)
        later = verifier.submit("an answer", "later", "stop")
        assert script.num_attempts("lost") == 1, "not while another task runs"
        done.set()
        assert tried.result(240).label == label
        assert [future.result(240).label for future in (long, later)] == ["correct"] * 2
    first, second = [(limit, running) for gold, limit, running in script.attempts if gold == "lost"]
    assert first == (4.0, {"long", "lost"})
    assert second == (40.0, {"lost"}), "nothing else, and ten times as long"
    assert [gold for gold, _, _ in script.attempts] == ["long", "lost", "lost", "later"], "the next task waits for it"


@pytest.mark.parametrize("reason", ["soft limit", "crash", "unreadable gold", "not equal"])
def test_what_a_grader_says_itself_is_final(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    script = Script({"gold": [reason]}, held={})
    monkeypatch.setattr(Grader, "script", script, raising=False)
    monkeypatch.setattr(service, "Worker", Grader)
    with Verifier(VerifyConfig(mode="math-verify", workers=2)) as verifier:
        assert verifier.submit("an answer", "gold", "stop").result(240).reason == reason
    assert script.num_attempts("gold") == 1


def test_turns_of_many_threads() -> None:
    """Whoever is alone is; nobody is left waiting."""
    turns, counts, lock, inside, worst = Turns(), Counter[str](), threading.Lock(), [], []

    def take(kind: str) -> None:
        for _ in range(50):
            with getattr(turns, kind)():
                with lock:
                    inside.append(kind)
                    worst.append("alone" in inside and len(inside) > 1)
                with lock:
                    inside.remove(kind)
                    counts[kind] += 1

    threads = [threading.Thread(target=take, args=(kind,)) for kind in ["together"] * 3 + ["alone"] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert counts == {"together": 150, "alone": 100}
    assert not any(worst)


def test_a_stopped_worker_changes_no_verdict() -> None:
    """It gets no processor time, as on a machine that is busy with something else, until it is killed."""
    with Verifier(VerifyConfig(workers=1, soft_seconds=20.0, hard_seconds=1.0)) as verifier:
        assert verifier.submit(r"\boxed{\sqrt{4}}", "2", "stop").result(240).label == "correct"
        first = min(workers_of(os.getpid()))
        os.kill(first, signal.SIGSTOP)
        right, wrong = (verifier.submit(r"\boxed{\sqrt{9}}", gold, "stop") for gold in ("3", "4"))
        assert (right.result(240).label, wrong.result(240).label) == ("correct", "wrong")
        assert first not in workers_of(os.getpid())


def test_processor_time_ends_what_python_cannot_interrupt() -> None:
    """A huge power is one step of Python's: the kernel ends it, long before the wall-clock limit; it is not tried again."""
    with Verifier(VerifyConfig(workers=1, soft_seconds=0.2, hard_seconds=600.0)) as verifier:
        verdict = verifier.submit(r"\boxed{9^{9^{9}}}", "x+1", "stop").result(240)
    assert verdict.label == "unknown"
    assert verdict.reason.startswith("soft limit")


def test_the_soft_limit_counts_processor_time_alone() -> None:
    """Waiting, for instance for a core on a busy machine, does not count; computing does."""
    program = """
import time
from nft_megatron.verify.worker import SoftLimit, limits
with limits(0.2, 60.0):
    time.sleep(0.6)
print("waited")
try:
    with limits(0.2, 60.0):
        while True:
            pass
except SoftLimit:
    print("gave up", time.process_time() >= 0.2)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines() == ["waited", "gave up True"], result.stderr


def test_the_hard_limit_kills_and_replaces_a_worker_that_never_answers() -> None:
    with Verifier(VerifyConfig(workers=1, soft_seconds=600.0, hard_seconds=0.3)) as verifier:
        verdict = verifier.submit(r"\boxed{(x+y+z)^{60}}", "x+y", "stop").result(240)
        assert (verdict.label, verdict.reason) == ("unknown", "hard limit")
        assert verdict.seconds >= 3.0, "the second time it had ten times as long"
        assert verifier.submit(r"\boxed{\sqrt{9}}", "3", "stop").result(240).label == "correct"
