"""Runs functions and the command in processes forked from one that has imported everything: a start costs no import time.

:class:`Ranks`, behind the fixtures ``command`` and ``start`` of conftest.py, is one launch: each process is a session of its
own, with the exit code, the output and the signals of the installed command. :class:`World`, behind the fixture ``world``, is
processes that stay up and do one task after another, each task in process groups of its own.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["launcher_preload"])
# The fork server of Python 3.11 does not take over sys.path, and ignores what it cannot preload.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))


@dataclass
class Outcome:
    returncode: int
    stdout: str
    stderr: str


class Ranks:
    """``function(*arguments)`` in ``count`` processes with the environment that torchrun would give them.

    ``function`` belongs to a module that can be imported (one beside this file, or of the package).
    """

    def __init__(self, function: Callable[..., object], arguments: tuple[object, ...], count: int, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._folder = folder
        self.processes: list[BaseProcess] = []
        for rank in range(count):
            variables = _variables(rank, count) | {"MASTER_PORT": str(port)} if count > 1 else {}
            process = CONTEXT.Process(target=_main, args=(function, arguments, variables, folder, rank))
            process.start()
            self.processes.append(process)

    @property
    def is_running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def signal(self, number: int) -> None:
        """To every rank that still runs."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def wait(self, timeout: float = 240.0) -> Outcome:
        """The first failing rank's exit code, and rank 0's output."""
        for process in self.processes:
            process.join(timeout)
        if self.is_running:
            self.signal(signal.SIGKILL)
            raise TimeoutError(f"still running after {timeout} s:\n{(self._folder / 'stderr0').read_text()}")
        codes = [process.exitcode for process in self.processes]
        output = [path.read_text() if path.exists() else "" for path in (self._folder / "stdout0", self._folder / "stderr0")]
        return Outcome(next((code for code in codes if code), 0), *output)


class World:
    """``size`` processes that do one task after another.

    For each task they meet in a new store that this process holds, as torchrun's workers do after a restart. A task that fails
    on any rank takes the processes along, and the next task gets new ones.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self._size, self._folder = size, folder
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *arguments: object, timeout: float = 240.0) -> Any:
        """What rank 0 returns; ``function`` as for :class:`Ranks`."""
        from torch.distributed import TCPStore

        if not self._processes:
            self._start()
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for connection in self._connections:
            connection.send((store.port, function, arguments))
        results: dict[int, Any] = {}
        while len(results) < self._size:
            pending = [each for rank, each in enumerate(self._connections) if rank not in results]
            ready = wait(pending, timeout)
            for connection in ready:
                rank = self._connections.index(connection)
                try:
                    fault, results[rank] = connection.recv()
                except EOFError:
                    fault = "the process has died"
                if fault:
                    self._fail(rank, fault)
            if not ready:
                self._fail(self._connections.index(pending[0]), f"still running after {timeout} s")
        return results[0]

    def close(self) -> None:
        """Let the processes leave by themselves, which aborts where a process group is left open."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(60)
        codes = [process.exitcode for process in self._processes]
        self._kill()
        assert not any(codes), codes

    def _start(self) -> None:
        for rank in range(self._size):
            ours, theirs = CONTEXT.Pipe()
            variables = _variables(rank, self._size) | {"TORCHELASTIC_USE_AGENT_STORE": "True"} if self._size > 1 else {}
            process = CONTEXT.Process(target=_main, args=(_serve, (theirs,), variables, self._folder, rank))
            process.start()
            theirs.close()  # so that the death of the process is an end of file
            self._processes.append(process)
            self._connections.append(ours)

    def _fail(self, rank: int, fault: str) -> None:
        self._kill()
        raise AssertionError(f"rank {rank} of {self._size}: {fault}\n{(self._folder / f'stderr{rank}').read_text()[-4000:]}")

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join(60)
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []


def _variables(rank: int, size: int) -> dict[str, str]:
    """What torchrun would say, but for the port."""
    env = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    return {name: str(value) for name, value in env.items()}


def _serve(connection: Connection) -> None:
    """Do what is asked for until nobody is there to ask."""
    while True:
        try:
            port, function, arguments = connection.recv()
        except EOFError:
            return
        os.environ["MASTER_PORT"] = str(port)
        try:
            answer = None, function(*arguments)
        except BaseException:
            answer = traceback.format_exc(), None
        connection.send(answer)


def _main(
    function: Callable[..., object], arguments: tuple[object, ...], variables: dict[str, str], folder: Path, rank: int
) -> None:
    os.setsid()
    os.environ.update(variables)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    function(*arguments)
