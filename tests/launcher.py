"""Runs functions and the command in processes forked from one that has imported everything, so starts cost no import time.

:class:`Ranks`, behind the fixtures ``command`` and ``start`` of conftest.py, is one launch: each process has its own session,
with the exit code, output and signals of the installed command. :class:`World`, behind the fixture ``world``, returns what a
function returned in such a launch.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from nft_megatron.base.ports import free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["launcher_preload"])
# Python 3.11's fork server does not inherit sys.path, and ignores what it cannot preload.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))


@dataclass
class Outcome:
    returncode: int
    stdout: str
    stderr: str


class Ranks:
    """Runs ``function(*arguments)`` in ``count`` processes with the environment that torchrun would give them.

    ``function`` must be in an importable module (one next to this file, or in the package).
    """

    def __init__(self, function: Callable[..., object], arguments: tuple[object, ...], count: int, folder: Path) -> None:
        self._folder, port = folder, free_port("127.0.0.1")
        self.processes: list[BaseProcess] = []
        for rank in range(count):
            env = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables = {name: str(value) for name, value in env.items()} if count > 1 else {}
            process = CONTEXT.Process(target=_main, args=(function, arguments, variables, folder, rank))
            process.start()
            self.processes.append(process)

    @property
    def is_running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def signal(self, number: int) -> None:
        """Send a signal to every rank that is still running."""
        for process in self.processes:
            if process.is_alive():  # the id of one that has ended may be that of another process by now
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


@dataclass(frozen=True)
class World:
    """``size`` processes for one task at a time, forked anew each time, so that no task sees what another left."""

    size: int
    folder: Path

    def __call__(self, function: Callable[..., Any], *arguments: object) -> Any:
        """Return rank 0's result; ``function`` as for :class:`Ranks`."""
        result = self.folder / "result"
        result.unlink(missing_ok=True)
        ended = Ranks(_keep_result, (result, function, arguments), self.size, self.folder).wait()
        assert ended.returncode == 0, ended.stderr[-4000:]
        return pickle.loads(result.read_bytes())


def _keep_result(path: Path, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    result = function(*arguments)
    if os.environ.get("RANK", "0") == "0":
        path.write_bytes(pickle.dumps(result))


def _main(
    function: Callable[..., object], arguments: tuple[object, ...], variables: dict[str, str], folder: Path, rank: int
) -> None:
    os.setsid()
    os.environ.update(variables)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    function(*arguments)
