"""The parent's side of the worker processes: split the work, collect the answers, replace workers that die.

A worker's life: started → asked to load → *ready* once its fingerprint equals the parent's → generating → ready. A worker that
exits or is silent past its deadline is killed and its unfinished answers come back as ``abort``. Its successor loads the
current weights before anything else, so no worker ever serves older ones. If the workers of one index keep dying without
finishing an answer, the engine is at fault.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Completion, Request, Sampling
from nft_megatron.rollout.engine import EngineFault
from nft_megatron.rollout.shared_weights import Entry, open_anonymous, write_weights
from nft_megatron.rollout.worker import WorkerSettings

log = logging.getLogger(__name__)

_MAX_DEATHS = 3  # of workers with one index, since one of them last finished an answer
_CLOSE_SECONDS = 5.0

# Every decoding step frees a few hundred KiB and allocates them again. By default glibc returns them to the kernel each time,
# and the page faults cost 5 % of the tokens/s at toy sizes: make it keep them.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


def split_requests(requests: Sequence[Request], num_parts: int) -> list[list[tuple[Request, int]]]:
    """Split the requests into ``num_parts``: for each part, requests with the index of their first seed.

    Whole requests are dealt out in turn, since the answers to a prompt share its prefill; the seeds of the last few requests
    are divided. The split depends only on the requests, never on which worker is faster.

    >>> requests = [Request(i, np.array([1]), seeds=(10 * i, 10 * i + 1)) for i in range(3)]
    >>> [[(request.request_id, first, request.seeds) for request, first in part] for part in split_requests(requests, 2)]
    [[(0, 0, (0, 1)), (2, 0, (20,))], [(1, 0, (10, 11)), (2, 1, (21,))]]
    """
    num_whole = len(requests) // num_parts * num_parts
    parts = [[(request, 0) for request in requests[part:num_whole:num_parts]] for part in range(num_parts)]
    for request in requests[num_whole:]:
        for part, indices in zip(parts, np.array_split(np.arange(len(request.seeds)), num_parts), strict=True):
            if len(indices):
                first, last = int(indices[0]), int(indices[-1])
                part.append((Request(request.request_id, request.prompt_tokens, request.seeds[first : last + 1]), first))
    return parts


class _Worker:
    """One process and the connection to it."""

    def __init__(self, index: int, settings: dict[str, Any], weights: int, num_deaths: int, send_seconds: float) -> None:
        self.index, self.num_deaths = index, num_deaths
        self.ticket = 0
        self.ready = False
        self.deadline = 0.0  # seconds of further silence after which it counts as hung
        self.connection, child = Pipe()
        # Sending to a stopped process would block forever; with this the kernel fails the send instead.
        with socket.socket(fileno=os.dup(self.connection.fileno())) as end:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(send_seconds) + 1, 0))
        own = WorkerSettings(**settings, parent=os.getpid(), connection=child.fileno(), weights=weights)
        variables = {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": str(own.threads),
            "MKL_NUM_THREADS": str(own.threads),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nft_megatron.rollout.worker", own.to_argument()],
            pass_fds=(child.fileno(), weights),
            stdin=subprocess.DEVNULL,
            env=_KEEP_MEMORY | os.environ | variables,
        )
        child.close()

    def command(self, ticket: int, name: str, arguments: Any, deadline: float) -> None:
        """Send a command; replies to earlier ones no longer count."""
        self.ticket, self.deadline = ticket, deadline
        try:
            self.connection.send((ticket, name, arguments))
        except OSError as error:  # it died or is stopped; half a message may be in the pipe
            log.warning("engine worker %d did not accept a command: %s", self.index, error)
            self.process.kill()  # so that the next receive finds the connection closed

    def end(self, seconds: float) -> None:
        """Close the connection, which ends the process; kill the process if that takes longer than ``seconds``."""
        self.connection.close()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(seconds)


class WorkerPool:
    """``num_processes`` workers as one engine. They start at once, in the background.

    ``load_seconds`` limits how long a worker may take to start or to load weights, ``answer_seconds`` how long it may be silent
    while it generates.
    """

    def __init__(
        self,
        model_folder: Path,
        *,
        num_processes: int,
        batch_size: int,
        threads: int,
        dtype: torch.dtype,
        load_seconds: float,
        answer_seconds: float,
    ) -> None:
        self._settings: dict[str, Any] = {
            "model_folder": str(model_folder),
            "batch_size": batch_size,
            "threads": threads,
            "dtype": str(dtype).removeprefix("torch."),
        }
        self._load_seconds, self._answer_seconds = load_seconds, answer_seconds
        self._weights = open_anonymous()
        self._entries: list[Entry] = []
        self._fingerprint, self._version = "", -1
        self._ticket = 0
        self._workers = [self._start(index, num_deaths=0) for index in range(num_processes)]

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        self._version = version
        self._entries, self._fingerprint = write_weights(self._weights, tensors)
        for worker in self._workers:
            self._ask_to_load(worker)
        self._await_ready()
        return self._fingerprint

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        self._await_ready()
        self._ticket += 1
        first_index: dict[int, dict[int, int]] = {}
        unfinished: dict[_Worker, set[tuple[int, int]]] = {}
        for worker, part in zip(self._workers, split_requests(requests, len(self._workers)), strict=True):
            if part:
                first_index[worker.index] = {request.request_id: first for request, first in part}
                unfinished[worker] = {
                    (request.request_id, first + offset) for request, first in part for offset in range(len(request.seeds))
                }
                worker.command(self._ticket, "generate", ([request for request, _ in part], sampling), self._answer_seconds)
        while unfinished:
            for worker, kind, payload in self._receive(list(unfinished), self._answer_seconds):
                if kind == "answers":
                    worker.num_deaths = 0
                    for completion in payload:
                        index = completion.index + first_index[worker.index][completion.request_id]
                        unfinished[worker].remove((completion.request_id, index))
                        yield dataclasses.replace(completion, index=index)
                elif kind == "done":
                    assert not unfinished.pop(worker), "a worker was done with answers left"
                else:
                    self._replace(worker, payload)
                    for request_id, index in sorted(unfinished.pop(worker)):
                        yield aborted(request_id, index, self._version)

    def close(self) -> None:
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.end(_CLOSE_SECONDS)
        if self._workers:
            os.close(self._weights)
        self._workers = []

    def _start(self, index: int, num_deaths: int) -> _Worker:
        return _Worker(index, self._settings, self._weights, num_deaths, self._load_seconds)

    def _ask_to_load(self, worker: _Worker) -> None:
        self._ticket += 1
        worker.ready = False
        worker.command(self._ticket, "load", (self._entries, self._version), self._load_seconds)

    def _await_ready(self) -> None:
        """Wait until every worker holds the current weights, replacing those that die."""
        while waiting := [worker for worker in self._workers if not worker.ready]:
            for worker, kind, payload in self._receive(waiting, self._load_seconds):
                if kind == "loaded":
                    if payload != self._fingerprint:
                        raise EngineFault(f"engine worker {worker.index} holds weights {payload}, not {self._fingerprint}")
                    worker.ready = True
                else:
                    self._replace(worker, payload)

    def _replace(self, worker: _Worker, cause: str) -> None:
        """End a faulty worker and start its successor, which loads the current weights first."""
        num_deaths = worker.num_deaths + 1
        worker.process.kill()
        worker.end(_CLOSE_SECONDS)
        if num_deaths == _MAX_DEATHS:
            raise EngineFault(f"engine worker {worker.index} {cause}, {num_deaths} times in a row without a finished answer")
        log.warning("engine worker %d %s: aborting its unfinished answers and restarting it", worker.index, cause)
        successor = self._start(worker.index, num_deaths)
        self._workers[worker.index] = successor
        self._ask_to_load(successor)

    def _receive(self, workers: list[_Worker], deadline: float) -> list[tuple[_Worker, str, Any]]:
        """Wait for replies to the workers' current commands: ``(worker, kind, payload)``.

        A worker that exited, or was silent past its ``deadline``, gives the kind ``died`` with the cause. Raises a worker's
        ``UserError``, or ``EngineFault`` with the worker's traceback if it failed.
        """
        started = time.monotonic()
        heard = wait([worker.connection for worker in workers], timeout=max(0.0, min(worker.deadline for worker in workers)))
        waited = time.monotonic() - started
        replies: list[tuple[_Worker, str, Any]] = []
        for worker in workers:
            if worker.connection not in heard:
                worker.deadline -= waited
                if worker.deadline <= 0:
                    replies.append((worker, "died", f"was silent for {deadline:g} s"))
                continue
            worker.deadline = deadline
            try:
                ticket, kind, payload = worker.connection.recv()
            except (EOFError, OSError):
                replies.append((worker, "died", f"exited ({_exit_text(worker.process)})"))
                continue
            if ticket == worker.ticket:
                if kind == "refused":
                    raise UserError(*payload)
                if kind == "fault":
                    raise EngineFault(f"engine worker {worker.index} failed:\n{payload}")
                replies.append((worker, kind, payload))
        return replies


def _exit_text(process: subprocess.Popen[bytes]) -> str:
    try:
        status = process.wait(_CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        return "connection closed"
    return f"signal {-status}" if status < 0 else f"exit code {status}"


def aborted(request_id: int, index: int, version: int) -> Completion:
    """The completion, without tokens, of an answer cut off by an engine fault."""
    nothing = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32)
    return Completion(request_id, index, *nothing, finish_reason="abort", weight_version=version, seconds=0.0)
