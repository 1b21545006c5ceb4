"""The verifier with real worker processes, which are killed, run away and lose their parent."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import get_args

import pytest
from grader_processes import kill_workers, workers_of
from waiting import until

from nft_megatron.config.sections import BuiltInMode, VerifyConfig
from nft_megatron.verify.modes import MODES
from nft_megatron.verify.reasons import reason_of
from nft_megatron.verify.service import Verifier, Worker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")

ENDLESS = r"\boxed{9^{9^{9^{9}}}}"
PATIENT = VerifyConfig(workers=1, soft_seconds=600.0, hard_seconds=600.0)
CASES = [
    (r"\boxed{\frac{\sqrt{2}}{2}}", r"\frac{1}{\sqrt{2}}", "correct"),
    (r"\boxed{(x+1)^2}", "x^2+2x+1", "correct"),
    (r"\boxed{x+2}", "x+1", "wrong"),
    (r"\boxed{[0, 1]}", "[0,1)", "wrong"),
    (r"\boxed{\sqrt{1156}}", "34", "correct"),
    (r"\boxed{2^{5}}", "34", "wrong"),
    (r"$\boxed{1}$ and $\boxed{2}$", r"\{1, 2\}", "correct"),
    (r"\boxed{[0, 1)}", "[0,1)", "correct"),
    (r"\boxed{34}", "34", "correct"),
    ("no box", "34", "wrong"),
]


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    with Verifier(VerifyConfig(workers=2, soft_seconds=20.0, hard_seconds=30.0)) as shared:
        yield shared


@pytest.mark.parametrize(("text", "gold", "label"), CASES)
def test_verdicts(verifier: Verifier, text: str, gold: str, label: str) -> None:
    assert verifier.submit(text, gold, "stop").result(240).label == label


def test_threads_and_asyncio_agree(verifier: Verifier) -> None:
    expected = [label for _, _, label in CASES]
    from_threads: dict[int, list[str]] = {}

    def ask(index: int) -> None:
        from_threads[index] = [verdict.label for verdict in verifier.verify_many((t, g, "stop") for t, g, _ in CASES)]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    async def ask_all() -> list[str]:
        futures = [asyncio.wrap_future(verifier.submit(text, gold, "stop")) for text, gold, _ in CASES]
        return [verdict.label for verdict in await asyncio.gather(*futures)]

    assert [from_threads[index] for index in range(4)] == [expected] * 4
    assert asyncio.run(ask_all()) == expected


def test_a_cancelled_waiter_leaves_the_others_alone(verifier: Verifier) -> None:
    """Two callers with the same question share one future, which asyncio must not cancel."""

    async def cancel_first() -> str:
        first = asyncio.wrap_future(verifier.submit(r"\boxed{\sqrt{49}}", "7", "stop"))
        second = asyncio.wrap_future(verifier.submit(r"\boxed{\sqrt{49}}", "7", "stop"))
        first.cancel()
        return (await second).label

    assert asyncio.run(cancel_first()) == "correct"


def test_integers_start_no_process() -> None:
    before = workers_of(os.getpid())
    with Verifier() as verifier:
        verdicts = verifier.verify_many([(rf"\boxed{{{i}}}", "3", "stop") for i in range(100)])
        assert workers_of(os.getpid()) == before
    assert [verdict.label == "correct" for verdict in verdicts] == [i == 3 for i in range(100)]


def test_math_verify_mode_reads_the_whole_text() -> None:
    with Verifier(VerifyConfig(mode="math-verify", workers=1, soft_seconds=20.0, hard_seconds=30.0)) as verifier:
        assert verifier.submit("The answer is 34", "34", "stop").result(240).label == "correct"
        assert verifier.submit("The answer is 34", "34", "length").result(240).label == "wrong"
        assert verifier.submit("The answer is 34", "34", "abort").result(240).label == "unknown"
        verdict = verifier.submit("The answer is 34", r"\frac{", "stop").result(240)
        assert verdict.verifier.startswith("math-verify/")


def test_a_remembered_verdict_does_not_keep_the_text() -> None:
    """An answer may have tens of thousands of characters, and as many verdicts are remembered."""

    class Text(str):  # a plain str takes no weak references
        pass

    with Verifier(VerifyConfig(mode="math-verify", workers=1, soft_seconds=20.0, hard_seconds=30.0)) as verifier:
        text = Text("so it is $34$")
        first = verifier.submit(text, "34", "stop")
        assert first.result(240).label == "correct"
        assert verifier.submit("so it is $34$", "34", "stop") is first, "remembered"
        assert verifier.submit("so it is $34$", "35", "stop").result(240).label == "wrong"  # the worker's next task
        text = weakref.ref(text)
        assert text() is None


def test_soft_limit() -> None:
    with Verifier(VerifyConfig(workers=1, soft_seconds=0.3, hard_seconds=60.0)) as verifier:
        verdict = verifier.submit(r"\boxed{(x+y+z)^{60}}", "x+y", "stop").result(240)
        pids = workers_of(os.getpid())
        assert (verdict.label, verdict.reason) == ("unknown", "soft limit")
        assert verifier.submit(r"\boxed{\sqrt{9}}", "3", "stop").result(240).label == "correct"
        assert workers_of(os.getpid()) == pids, "the worker that gave up was kept"


def test_killed_worker_gives_unknown_and_the_next_task_works() -> None:
    with Verifier(PATIENT) as verifier:
        assert verifier.submit(r"\boxed{\sqrt{4}}", "2", "stop").result(240).label == "correct"
        futures, killed = [], set()
        for _ in range(2):
            futures.append(verifier.submit(r"\boxed{(x+y+z)^{60}}", "x+y", "stop"))
            until(lambda: killed.update(kill_workers()) or futures[-1].done())
            assert futures[-1].result().label == "unknown"
            assert futures[-1].result().reason == "worker died: exit code -9"
        assert futures[0] is not futures[1], "an unknown verdict is not remembered"
        until(lambda: not killed & set(workers_of(os.getpid())))
        assert verifier.submit(r"\boxed{\sqrt{9}}", "3", "stop").result(240).label == "correct"


def test_every_verdict_arrives_once_and_in_its_place_while_workers_are_killed(monkeypatch) -> None:
    """A task that loses its worker is tried again; one that loses two is unknown; nobody gets another's verdict."""
    numbers = range(2, 62)
    golds = [(rf"\boxed{{\sqrt[2]{{{n * n}}}}}", str(n if n % 3 else n + 1), "stop") for n in numbers]
    expected = ["unknown" if n % 50 == 7 else "correct" if n % 3 else "wrong" for n in numbers]
    kills = {n * n: 2 if n % 50 == 7 else 1 for n in numbers if n % 50 == 7 or n % 20 == 5}
    exchange = Worker._exchange

    def dying(worker: Worker, request: bytes, seconds: float) -> bytes:
        square = int(re.search(rb"\{(\d+)\}", request).group(1)) if request else 0
        if not kills.get(square):
            return exchange(worker, request, seconds)
        kills[square] -= 1
        worker.process.send_signal(signal.SIGSTOP)  # so that it dies with the task
        worker._socket.sendall(request)
        worker.process.kill()
        return exchange(worker, b"", seconds)

    monkeypatch.setattr(Worker, "_exchange", dying)
    with Verifier(VerifyConfig(workers=2, soft_seconds=600.0, hard_seconds=600.0)) as verifier:
        verdicts = list(verifier.verify_many(golds))
    assert [verdict.label for verdict in verdicts] == expected
    assert {reason_of(verdict) for verdict in verdicts if verdict.label == "unknown"} == {"worker died"}
    assert not any(kills.values())


def test_a_task_whose_worker_is_killed_is_tried_again(monkeypatch) -> None:
    sent, exchange = [], Worker._exchange

    def noted(worker: Worker, request: bytes, seconds: float) -> bytes:
        sent.append(request)
        return exchange(worker, request, seconds)

    monkeypatch.setattr(Worker, "_exchange", noted)
    with Verifier(PATIENT) as verifier:
        assert verifier.submit(r"\boxed{\sqrt{4}}", "2", "stop").result(240).label == "correct"
        until(lambda: len(workers_of(os.getpid())) >= 2)  # the worker and its spare
        first = min(workers_of(os.getpid()))
        os.kill(first, signal.SIGSTOP)  # so that the task is with it for sure when it dies
        future = verifier.submit(r"\boxed{\sqrt{9}}", "3", "stop")
        until(lambda: any(b"sqrt{9}" in request for request in sent))
        os.kill(first, signal.SIGKILL)
        assert future.result(240).label == "correct"


def test_the_table_has_every_mode_that_a_config_may_name() -> None:
    assert set(get_args(BuiltInMode)) == set(MODES)


def test_dapo_mode_starts_no_process() -> None:
    before = workers_of(os.getpid())
    with Verifier(VerifyConfig(mode="dapo")) as verifier:
        texts = ["Answer: 34", r"Answer: $\frac{68}{2}$", "Answer: 2^{10}", "34"]
        assert [v.label for v in verifier.verify_many((t, "34", "stop") for t in texts)] == ["correct"] * 2 + ["wrong"] * 2
        assert workers_of(os.getpid()) == before


def test_simplerl_mode() -> None:
    """As in the public grader, truncated answers are judged by their text, and a last number needs no box."""
    with Verifier(VerifyConfig(mode="simplerl", workers=1, soft_seconds=20.0, hard_seconds=30.0)) as verifier:
        verdict = verifier.submit(r"\boxed{(x+1)^2}", "x^2+2x+1", "length").result(240)
        assert (verdict.label, verdict.reason, verdict.verifier) == ("correct", "equal", "simplerl/3")
        assert verifier.submit("so we get 34", "34", "stop").result(240).label == "correct"
        assert verifier.submit(r"\boxed{35}", "34", "stop").result(240).label == "wrong"
        assert verifier.submit(r"\boxed{34}", "34", "abort").result(240).label == "unknown"


def test_workers_are_recycled() -> None:
    with Verifier(VerifyConfig(workers=1, soft_seconds=20.0, hard_seconds=30.0), tasks_per_worker=2) as verifier:
        seen = set()
        for root in range(2, 8):
            assert verifier.submit(rf"\boxed{{\sqrt{{{root * root}}}}}", str(root), "stop").result(240).label == "correct"
            seen |= set(workers_of(os.getpid()))
        assert len(seen) >= 4, "three workers of two tasks and a spare"


def test_memory_limit() -> None:
    """A text of 48 MB does not fit into a worker of 128 MB, half of which imports take."""
    settings = VerifyConfig(mode="math-verify", workers=1, soft_seconds=60.0, hard_seconds=60.0)
    with Verifier(settings, memory_bytes=128 * 2**20) as verifier:
        verdict = verifier.submit("x" * (48 * 2**20), "34", "stop").result(240)
        assert verdict.label == "unknown"
        assert reason_of(verdict) in ("worker died", "crash")
        assert verifier.submit(r"\boxed{\sqrt{9}}", "3", "stop").result(240).label == "correct"


def test_workers_do_without_torch() -> None:
    with Verifier(PATIENT) as verifier:
        verifier.submit(r"\boxed{\sqrt{9}}", "3", "stop").result(240)
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in workers_of(os.getpid())]
    assert maps
    assert not any("libtorch" in text for text in maps)


def test_close_answers_everybody_and_leaves_nobody() -> None:
    before = set(workers_of(os.getpid()))
    verifier = Verifier(PATIENT)
    futures = [verifier.submit(r"\boxed{(x+y+z)^{60}}", f"x+{i}", "stop") for i in range(5)]
    until(lambda: bool(set(workers_of(os.getpid())) - before))
    verifier.close()
    verifier.close()
    assert [future.result(240).label for future in futures] == ["unknown"] * 5
    assert set(workers_of(os.getpid())) <= before
    with pytest.raises(RuntimeError, match="closed"):
        verifier.submit(r"\boxed{\sqrt{9}}", "3", "stop")


def test_no_worker_outlives_a_killed_parent() -> None:
    program = f"""
import time
from nft_megatron.config.sections import VerifyConfig
from nft_megatron.verify.service import Verifier
verifier = Verifier(VerifyConfig(workers=2, soft_seconds=600.0, hard_seconds=600.0))
verifier.submit(r"\\boxed{{\\sqrt{{9}}}}", "3", "stop").result(240)
verifier.submit({ENDLESS!r}, "34", "stop")
verifier.submit({ENDLESS!r}, "35", "stop")
print("busy", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "busy\n"
        until(lambda: len(workers_of(parent.pid)) == 3)
        pids = workers_of(parent.pid)
        parent.kill()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
