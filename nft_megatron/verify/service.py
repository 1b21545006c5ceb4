"""The verifier: decides what it can at once and lets killable processes compare the rest.

Each worker has one thread, which hands its process one task at a time. Processor time decides what takes too long: a comparison
ends at ``verify.soft_seconds`` of it, and where Python cannot interrupt itself the kernel ends the process at twice that.
Wall-clock time (``verify.hard_seconds``) only finds processes that are stuck, and on a busy machine a healthy one may look like
that. So a task that loses its process, by that limit or because the process dies (killed from outside, out of memory), is tried
once more alone: no other task runs meanwhile, and the limit is ``_ALONE`` times as long. If it fails again, it is *unknown*,
never wrong.

A warm spare takes over from a process that is gone, so that the next task does not wait for imports. No process starts before
the first task that needs one: data sets with integer answers hardly ever do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType

from nft_megatron.base.deadline import Deadline
from nft_megatron.base.errors import UserError
from nft_megatron.base.records import FinishReason, Verdict
from nft_megatron.config.sections import VerifyConfig
from nft_megatron.verify.comparison import Undecided
from nft_megatron.verify.http_grader import HttpGrader
from nft_megatron.verify.modes import Mode, mode_of
from nft_megatron.verify.reasons import reason_of, verdict
from nft_megatron.verify.rules import rules_of
from nft_megatron.verify.turns import Turns

_PROGRAM = "nft_megatron.verify.worker"
_START_SECONDS = 300.0  # for imports, on a busy machine
_ALONE = 10  # times the hard limit: a tenth of a core is enough for a task that has the pool to itself
_KERNEL = 2  # times the soft limit: the processor time after which the kernel ends a process that does not give up
_LOST = ("hard limit", "worker died", "worker did not start")
"""How a task loses its process without having used up its processor time."""
_AHEAD = 1024  # answers
_CACHE_SIZE = 65536  # verdicts, keyed by digests because an answer in math-verify mode is a whole text


class Worker:
    """One worker process. Not thread-safe: only one thread at a time may use it.

    The thread that starts it must outlive it: the kernel counts the end of that *thread* as the parent's death.
    """

    def __init__(self, mode: Mode, settings: VerifyConfig, memory_bytes: int) -> None:
        assert mode.judge is not None
        judge = settings.grader if mode.judge == "function" else mode.judge
        self.num_tasks = 0
        self._buffer = b""
        self._socket, theirs = socket.socketpair()
        limits = (os.getpid(), settings.soft_seconds, _KERNEL * settings.soft_seconds, memory_bytes)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", _PROGRAM, judge, mode.version, str(theirs.fileno()), *map(str, limits)],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,  # what a user's function starts is killed with it
            )
        self._is_ready = False
        self._is_killed = False

    @property
    def is_alive(self) -> bool:
        return not self._is_killed and self.process.poll() is None

    def judge(self, task: Undecided, seconds: float) -> Verdict:
        """The verdict, with an empty ``verifier``. A worker that does not answer within ``seconds`` is killed.

        The clock starts when the worker, once ready, has the task. Raises :class:`UserError` as :meth:`get_ready` does.
        """
        request = json.dumps({"gold": task.gold, "text": task.text, "question": task.question}).encode() + b"\n"
        self.num_tasks += 1
        started = time.monotonic()
        try:
            if not self._is_ready:
                self.get_ready()
                started = time.monotonic()
            reply = json.loads(self._exchange(request, seconds))
        except TimeoutError:
            self.kill()
            if not self._is_ready:
                return verdict("worker did not start", "")
            return verdict("hard limit", "", seconds=time.monotonic() - started)
        except OSError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)  # it closed its socket: let it say why
            code = self.process.returncode
            self.kill()
            if code == -signal.SIGPROF:
                return verdict("soft limit", "", detail="ended by the kernel", seconds=time.monotonic() - started)
            return verdict(
                "worker died", "", detail=f"exit code {code}" if code is not None else "", seconds=time.monotonic() - started
            )
        return verdict(reply["reason"], "", detail=reply["detail"], seconds=reply["seconds"])

    def get_ready(self) -> None:
        """Wait until it has loaded what it needs.

        Raises:
            UserError: a user's function cannot be loaded.
            OSError: it died, or takes too long.
        """
        if problem := json.loads(self._exchange(b"", _START_SECONDS)).get("problem"):
            raise UserError(*problem)
        self._is_ready = True

    def kill(self) -> None:
        """End the process now, with all that it started. May be called from another thread; a pending :meth:`judge` returns
        *unknown*."""
        if not self._is_killed:
            self._is_killed = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill the process and wait until the kernel has reclaimed its memory, which may be gigabytes."""
        self.kill()
        self.process.wait()
        self._socket.close()

    def _exchange(self, request: bytes, seconds: float) -> bytes:
        """Send ``request``, receive one line. :class:`TimeoutError` after ``seconds``, another :class:`OSError` if it died."""
        deadline = Deadline.of(seconds)
        self._socket.settimeout(seconds)
        self._socket.sendall(request)
        while b"\n" not in self._buffer:
            self._socket.settimeout(deadline.left)
            chunk = self._socket.recv(65536)
            if not chunk:
                raise ConnectionError
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def _key(task: Undecided) -> bytes:
    """The cache key of a comparison: 32 bytes, however long the texts are."""
    return hashlib.sha256(json.dumps([task.gold, task.text, task.question]).encode()).digest()


_Job = tuple[Undecided, "Future[Verdict]"]


_Grader = Worker | HttpGrader


class Verifier:
    r"""Judges answers as ``settings`` say; thread-safe. Close it, or use ``with``.

    >>> with Verifier() as verifier:
    ...     verifier.submit(r"So it is \boxed{34}.", gold="34", finish_reason="stop").result().label
    'correct'
    """

    def __init__(
        self,
        settings: VerifyConfig | None = None,
        *,
        memory_bytes: int | None = None,
        tasks_per_worker: int = 2000,
    ) -> None:
        self._settings = settings = settings or VerifyConfig()
        self._mode = mode_of(settings.grader)
        self._memory_bytes = memory_bytes or int(settings.memory_gib * 2**30)
        self._tasks_per_worker = tasks_per_worker
        self._name = rules_of(settings.grader)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._turns = Turns()
        self._lock = threading.Lock()  # of everything below
        self._cache: OrderedDict[bytes, Future[Verdict]] = OrderedDict()
        self._workers: set[_Grader] = set()
        self._spare: _Grader | None = None
        self._is_closed = False

    @property
    def is_free(self) -> bool:
        """Whether answers and golds may have any form: no gold is a formula that a box could hold."""
        return self._mode.is_free

    def check(self) -> None:
        """Return once a user's function is loaded or a user's service has replied; of other modes, at once.

        Raises:
            UserError: it cannot be loaded, or does not reply.
        """
        if self._mode.judge in ("function", "program"):
            try:
                self._keep_spare()
                assert isinstance(self._spare, Worker)
                self._spare.get_ready()
            except OSError as error:
                problem = "its grader ended, or took too long, before it was ready"
                raise UserError("verify.mode", self._settings.grader, problem, "import its module by hand") from error
        elif self._mode.judge == "service":
            result = self._start().judge(Undecided("", ""), self._settings.hard_seconds)
            if reason_of(result) == "no reply":
                problem = f"gives {result.reason} within verify.hard_seconds = {self._settings.hard_seconds:g}"
                raise UserError("verify.url", self._settings.grader, problem, "start the service, or raise the limit")

    def submit(self, text: str, gold: str, finish_reason: FinishReason, question: str = "") -> Future[Verdict]:
        """The verdict on one answer. From asyncio: ``await asyncio.wrap_future(verifier.submit(…))``. Only a user's verifier
        sees the ``question``.

        Unblocked by: the mode's own decision, at once; else a worker's reply or the limits, after tasks queued before.
        """
        decision = self._mode.decide(text, gold, finish_reason)
        if isinstance(decision, Undecided):
            return self._compare(replace(decision, question=question) if self.is_free else decision)
        decided: Future[Verdict] = Future()
        decided.set_result(decision)
        return decided

    def verify_many(
        self, answers: Iterable[tuple[str, str, FinishReason] | tuple[str, str, FinishReason, str]]
    ) -> Iterator[Verdict]:
        """The verdicts on all (text, gold, finish reason[, question]), in order, each as soon as all before it are ready.

        Reads at most ``_AHEAD`` answers beyond the last verdict yielded, so that a file of any size fits in memory.
        """
        pending: deque[Future[Verdict]] = deque()
        for answer in answers:
            pending.append(self.submit(*answer))
            if len(pending) > _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def close(self) -> None:
        """Kill the workers; answers not judged by now become unknown. Returns within seconds."""
        with self._lock:
            self._is_closed = True
            doomed = [*self._workers, *([self._spare] if self._spare else [])]
            self._spare = None
        for _ in self._threads:
            self._jobs.put(None)
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

    def _compare(self, task: Undecided) -> Future[Verdict]:
        """Queue a task, unless the same one is decided or in progress: answers to one question often share their box."""
        key = _key(task)
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the verifier is closed")
            future = self._cache.get(key)
            if future is not None:
                return future
            future = self._cache[key] = Future()
            future.set_running_or_notify_cancel()  # several callers may wait for it: none may cancel it
            if len(self._cache) > _CACHE_SIZE:
                self._cache.popitem(last=False)
            if not self._threads:
                self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(self._settings.workers)]
                for thread in self._threads:
                    thread.start()
        self._jobs.put((task, future))
        return future

    def _serve(self) -> None:
        """Body of one thread: judge tasks, with one worker after another, until the verifier is closed."""
        worker: _Grader | None = None
        while (job := self._jobs.get()) is not None:
            task, future = job
            try:
                worker, result = self._judge(worker, task)
            except Exception as error:  # no process can be started, or a bug: the caller must see it
                self._forget(task)
                future.set_exception(error)
                continue
            if result.label == "unknown":
                self._forget(task)  # a retry may succeed
            future.set_result(replace(result, verifier=self._name))

    def _judge(self, worker: _Grader | None, task: Undecided) -> tuple[_Grader | None, Verdict]:
        """The verdict and the worker for the next task. A task that loses its worker is tried once more, alone."""
        with self._turns.together():
            worker = self._usable(worker)
            self._keep_spare()
            result = self._result(worker, task, self._settings.hard_seconds)
        if reason_of(result) in _LOST:
            with self._turns.alone():  # the next spare's imports would not leave it alone
                worker = self._usable(worker)
                result = self._result(worker, task, _ALONE * self._settings.hard_seconds)
            self._keep_spare()
        return worker, result

    @staticmethod
    def _result(worker: _Grader | None, task: Undecided, seconds: float) -> Verdict:
        return worker.judge(task, seconds) if worker else verdict("verifier closed", "")

    def _forget(self, task: Undecided) -> None:
        with self._lock:
            self._cache.pop(_key(task), None)

    def _usable(self, worker: _Grader | None) -> _Grader | None:
        """``worker`` itself, or the spare once it is dead or has done its tasks; None if the verifier is closed."""
        if worker and worker.is_alive and worker.num_tasks < self._tasks_per_worker:
            return worker
        if worker:
            worker.close()
        with self._lock:
            if worker:
                self._workers.discard(worker)
            if self._is_closed:
                return None
            fresh = self._spare if self._spare and self._spare.is_alive else self._start()
            self._spare = None
            self._workers.add(fresh)
        return fresh

    def _keep_spare(self) -> None:
        with self._lock:
            if self._spare is None and not self._is_closed:
                self._spare = self._start()

    def _start(self) -> _Grader:
        if self._mode.judge == "service":
            return HttpGrader(self._settings.grader)
        return Worker(self._mode, self._settings, self._memory_bytes)
