"""Ends a process whose interpreter stands still.

While C code holds the interpreter's lock no Python thread runs, the watchdog's included. The timer of :mod:`faulthandler` needs
no lock: when it fires, it writes the stacks of all threads to RUN/logs/phase_rank<r>.txt and ends the process with code 1. It
cannot say more than that, so each phase writes, as it begins, the exit report that such an end would deserve to the head of
that file; :func:`~nft_megatron.lifecycle.exit_report.read_exit_reports` finds both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import fcntl
import json
import os
import threading
from pathlib import Path

from nft_megatron.base.errors import EXIT_STALLED
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.lifecycle.exit_report import ExitReport, write_if_responsive

_HEAD_BYTES = 1024
_STDERR = 2
_SHORTEST, _LONGEST = 0.01, 1e9
"""What the timer takes, in seconds."""


class Backstop:
    """One per process, since :mod:`faulthandler` has one timer. Armed again and again as long as Python code runs."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._path, self._rank = RunFolder(run_dir).phase(rank), rank
        self._file: int | None = None
        self._lock = threading.Lock()

    def describe(self, phase: str, what: str) -> None:
        """``phase`` begins; ``what`` completes its report. For the phase's own thread: a folder that has disappeared blocks it.

        Before a run's first start has created RUN/logs, there is no file, and stacks would go to standard error.
        """
        message = f"rank {self._rank} {what}; the stacks of its threads are in {self._path.parent.name}/{self._path.name}"
        report = dataclasses.replace(ExitReport.here(EXIT_STALLED, message, phase), is_frozen=True)
        head = json.dumps(dataclasses.asdict(report)).ljust(_HEAD_BYTES - 1)[: _HEAD_BYTES - 1] + "\n"
        with self._lock, contextlib.suppress(OSError):
            if self._file is None:
                self._file = _open_alone(self._path)
            os.pwrite(self._file, head.encode(), 0)

    def arm(self, seconds: float) -> None:
        """End the process unless this is called again, or :meth:`close`, within ``seconds``."""
        seconds = min(max(seconds, _SHORTEST), _LONGEST)
        with contextlib.suppress(RuntimeError):  # no further thread can be started
            faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR if self._file is None else self._file)

    def close(self) -> None:
        """Nothing ends the process any more; the file goes."""
        faulthandler.cancel_dump_traceback_later()
        with self._lock:
            if self._file is not None:
                write_if_responsive(lambda: self._path.unlink(missing_ok=True))
                os.close(self._file)
                self._file = None


def _open_alone(path: Path) -> int:
    """The file, empty, positioned behind its head. Raises :class:`OSError` if another process of this rank still has it."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, 0)
        os.lseek(file, _HEAD_BYTES, os.SEEK_SET)
    except OSError:
        os.close(file)
        raise
    return file
