"""The verifier: decides what it can at once and lets killable processes compare the rest with math-verify.

One thread a worker: it hands its process one task, waits for the answer until the hard limit, and kills and replaces the
process that has none. That limit (``verify.hard_seconds``) goes by the clock and is for processes that hang; a comparison that
is merely long ends before it by the soft limit (``verify.soft_seconds``), which counts the worker's processor time. A warm
spare takes over, so that the next task does not wait for imports. Nothing is started before the first task that needs it: data
sets with integer answers never do.

A judgement that times out, crashes or is killed is *unknown*, never wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType

from nft_megatron.config import VerifySection
from nft_megatron.records import FinishReason, Verdict
from nft_megatron.verify.grade import STRICT, Undecided, cut_off, grade

_START_SECONDS = 60.0  # for imports, on a busy machine
_CACHE_SIZE = 65536  # verdicts; their keys are digests, since an answer in math-verify mode is a whole text


class Worker:
    """One worker process. Not thread-safe: one thread at a time uses it.

    The thread that starts it must outlive it: the kernel counts the end of that *thread* as the parent's death.
    """

    def __init__(self, settings: VerifySection, memory_bytes: int) -> None:
        self.num_tasks = 0
        self._buffer = b""
        self._hard_seconds = settings.hard_seconds
        self._socket, theirs = socket.socketpair()
        limits = (os.getpid(), settings.soft_seconds, settings.hard_seconds, memory_bytes)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nft_megatron.verify.worker", str(theirs.fileno()), *map(str, limits)],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._is_ready = False

    def judge(self, gold: str, answer: str) -> Verdict:
        """The verdict, its ``verifier`` left empty. A worker that does not answer in time is killed."""
        task = json.dumps({"gold": gold, "answer": answer}).encode() + b"\n"
        self.num_tasks += 1
        try:
            if not self._is_ready:
                self._exchange(b"", _START_SECONDS)
                self._is_ready = True
            reply = json.loads(self._exchange(task, self._hard_seconds))
        except TimeoutError:
            self.kill()
            return Verdict(
                "unknown", f"killed after {self._hard_seconds:g} s" if self._is_ready else "worker did not start", ""
            )
        except OSError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)  # it closed its socket: let it say why
            self.kill()
            return Verdict("unknown", f"worker ended with {self.process.returncode}", "")
        return Verdict(reply["label"], reply["reason"], "", reply["seconds"])

    def kill(self) -> None:
        """End the process now. May be called from another thread; whoever waits for its answer gets *unknown*."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self._socket.close()

    def _exchange(self, request: bytes, seconds: float) -> bytes:
        """Send ``request``, receive a line. :class:`TimeoutError` after ``seconds``, other :class:`OSError` if it is gone."""
        deadline = time.monotonic() + seconds
        self._socket.settimeout(seconds)
        self._socket.sendall(request)
        while b"\n" not in self._buffer:
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            chunk = self._socket.recv(65536)
            if not chunk:
                raise ConnectionError
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def _key(gold: str, answer: str) -> bytes:
    """What a comparison is remembered by: 32 bytes, however long the texts are."""
    return hashlib.sha256(json.dumps([gold, answer]).encode()).digest()


_Task = tuple[str, str, "Future[Verdict]"]


class Verifier:
    r"""Judges answers; thread-safe. Close it, or use it as a context manager.

    ``strict`` mode judges the last ``\boxed{}`` as :mod:`nft_megatron.verify.grade` says; ``math-verify`` mode gives the whole
    text to math-verify, as the reference implementation does.

    >>> with Verifier() as verifier:
    ...     verifier.submit(r"So it is \boxed{34}.", gold="34", finish_reason="stop").result().label
    'correct'
    """

    def __init__(
        self, settings: VerifySection | None = None, *, memory_bytes: int = 2 * 2**30, tasks_per_worker: int = 2000
    ) -> None:
        self._settings = settings = settings or VerifySection()
        self._memory_bytes, self._tasks_per_worker = memory_bytes, tasks_per_worker
        backend = f"math-verify/{importlib.metadata.version('math-verify')}"
        self._name = f"{STRICT} {backend}" if settings.mode == "strict" else backend
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()  # of everything below
        self._cache: OrderedDict[bytes, Future[Verdict]] = OrderedDict()
        self._workers: set[Worker] = set()
        self._spare: Worker | None = None
        self._is_closed = False

    def submit(self, text: str, gold: str, finish_reason: FinishReason) -> Future[Verdict]:
        """The verdict on one answer. From asyncio: ``await asyncio.wrap_future(verifier.submit(…))``.

        Unblocked by: the strict route at once; else a worker's reply, or the hard limit after those queued before it.
        """
        if self._settings.mode == "strict":
            decision = grade(text, gold, finish_reason)
        else:
            decision = cut_off(finish_reason, self._name) or Undecided(text, gold)
        if isinstance(decision, Undecided):
            boxed = rf"\boxed{{{decision.answer}}}" if self._settings.mode == "strict" else text
            return self._compare(rf"\boxed{{{gold}}}", boxed)
        decided: Future[Verdict] = Future()
        decided.set_result(decision)
        return decided

    def verify_many(self, answers: Iterable[tuple[str, str, FinishReason]]) -> list[Verdict]:
        """The verdicts on all (text, gold, finish reason), in order."""
        return [future.result() for future in [self.submit(*answer) for answer in answers]]

    def close(self) -> None:
        """Kill the workers; what is not judged by now becomes unknown. Returns within seconds."""
        with self._lock:
            self._is_closed = True
            doomed = [*self._workers, *([self._spare] if self._spare else [])]
            self._spare = None
        for _ in self._threads:
            self._tasks.put(None)
        for worker in doomed:
            worker.kill()
        for thread in self._threads:
            thread.join()
        for worker in doomed:
            worker.close()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _compare(self, gold: str, answer: str) -> Future[Verdict]:
        """Queue a task, unless the same one is known or under way: K answers to one question often share their box."""
        key = _key(gold, answer)
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the verifier is closed")
            future = self._cache.get(key)
            if future is not None:
                return future
            future = self._cache[key] = Future()
            future.set_running_or_notify_cancel()  # several may wait for it: none may cancel it
            if len(self._cache) > _CACHE_SIZE:
                self._cache.popitem(last=False)
            if not self._threads:
                self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(self._settings.workers)]
                for thread in self._threads:
                    thread.start()
        self._tasks.put((gold, answer, future))
        return future

    def _serve(self) -> None:
        """One thread: judge tasks with one worker after the other until the verifier is closed."""
        worker: Worker | None = None
        while (task := self._tasks.get()) is not None:
            gold, answer, future = task
            try:
                worker = self._usable(worker)
                verdict = worker.judge(gold, answer) if worker else Verdict("unknown", "verifier closed", "")
            except Exception as error:  # no process can be started, or a bug: whoever waits must hear of it
                self._forget(gold, answer)
                future.set_exception(error)
                continue
            if verdict.label == "unknown":
                self._forget(gold, answer)  # it may do better another time
            future.set_result(replace(verdict, verifier=self._name))

    def _forget(self, gold: str, answer: str) -> None:
        with self._lock:
            self._cache.pop(_key(gold, answer), None)

    def _usable(self, worker: Worker | None) -> Worker | None:
        """``worker`` itself, or the spare once it is dead or worn out; None when the verifier is closed."""
        if worker and worker.process.poll() is None and worker.num_tasks < self._tasks_per_worker:
            return worker
        with self._lock:
            if worker:
                self._workers.discard(worker)
                worker.close()
            if self._is_closed:
                return None
            fresh = self._spare if self._spare and self._spare.process.poll() is None else self._start()
            self._spare = self._start()
            self._workers.add(fresh)
        return fresh

    def _start(self) -> Worker:
        return Worker(self._settings, self._memory_bytes)
