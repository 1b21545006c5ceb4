"""How a rank ended, for machines: RUN/logs/end_rank<r>.json.

The code with which a process ends does not reach whoever started it: srun says 143 when a task ends with 7, torchrun says 1. So
a rank of ``nft-megatron train`` that ends with another code than 0 leaves the code and its cause in the run folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.rank_info import rank_info
from nft_megatron.base.run_folder import RunFolder

_LONGEST_MESSAGE = 2000
_LONGEST_WRITE = 10.0
"""Seconds. A folder that has gone away may keep who writes to it for ever."""


@dataclass(frozen=True)
class ExitReport:
    """One rank's end. ``host``: Slurm's name of the node, else the machine's. ``phase``: of the run, where it was in one.

    ``time``: seconds since 1970. ``message``: for a fault "ErrorType: text".

    >>> ExitReport(3, "node17", 1, "RuntimeError: no such device", phase="update", time=1748736000.0).phase
    'update'
    """

    rank: int
    host: str
    code: int
    message: str
    phase: str | None
    time: float

    @classmethod
    def here(cls, code: int, message: str, phase: str | None = None) -> ExitReport:
        """Of this process, now."""
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        return cls(rank_info().rank, host, code, message[:_LONGEST_MESSAGE], phase, time.time())


def write_exit_report(run_dir: Path, ending: ExitReport) -> None:
    """Leave ``ending`` in the run folder, if that is there and answers within ten seconds; says nothing if not."""

    def write() -> None:
        if run_dir.is_dir():
            with atomic_file(RunFolder(run_dir).end(ending.rank)) as temporary:
                temporary.write_text(json.dumps(asdict(ending)) + "\n")

    if_it_answers(write)


def read_exit_reports(run_dir: Path) -> list[ExitReport]:
    """Those in the run folder, the earliest first. What cannot be read, or is not of this form, is left out.

    >>> import tempfile
    >>> run_dir = Path(tempfile.mkdtemp())
    >>> for rank, seconds in ((0, 12.5), (1, 11.0)):
    ...     write_exit_report(run_dir, ExitReport(rank, "n1", 70, "stood still", "update", seconds))
    >>> [(ending.rank, ending.code, ending.phase) for ending in read_exit_reports(run_dir)]
    [(1, 70, 'update'), (0, 70, 'update')]
    """
    reports = []
    for path in RunFolder(run_dir).logs.glob("end_rank*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            reports.append(ExitReport(**json.loads(path.read_text())))
    return sorted(reports, key=lambda ending: ending.time)


def remove_exit_report(run_dir: Path, rank: int) -> None:
    """Delete what the rank's last end left: code, fault, stacks. A folder that cannot be written is somebody else's message."""
    folder = RunFolder(run_dir)
    for path in (folder.end(rank), folder.fault(rank), folder.stall(rank)):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def note_phase(error: BaseException, phase: str) -> None:
    """Let ``error`` carry the phase of the run in which it was raised, the innermost where they are nested."""
    if phase_of(error) is None:
        error.run_phase = phase  # type: ignore[attr-defined]


def phase_of(error: BaseException) -> str | None:
    """What :func:`note_phase` noted."""
    return getattr(error, "run_phase", None)


def if_it_answers(write: Callable[[], None]) -> None:
    """Call ``write`` and wait at most ten seconds for it. An :class:`OSError` is swallowed: the process is about to end."""

    def attempt() -> None:
        with contextlib.suppress(OSError):
            write()

    thread = threading.Thread(target=attempt, name="last words", daemon=True)
    thread.start()
    thread.join(_LONGEST_WRITE)
