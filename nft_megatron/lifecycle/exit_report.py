"""Machine-readable exit reports: RUN/logs/end_rank<r>.json.

The exit code of a rank does not reach whoever started it: when a task exits with 7, srun reports 143 and torchrun 1. So a rank
of ``nft-megatron train`` that exits with a code other than 0 records the code and its cause in the run folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.rank_info import rank_info
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.base.untrusted import parse_json

_LONGEST_MESSAGE = 2000
_LONGEST_WRITE = 10.0
"""Seconds. Writing to a folder that has disappeared may block forever."""


@dataclass(frozen=True)
class ExitReport:
    """How one rank ended. ``host``: Slurm's name of the node, else the machine's. ``phase``: the run's phase, if any.

    ``time``: seconds since 1970. ``message``: "ErrorType: text" for a fault. ``is_frozen``: its interpreter stood still, so it
    waited for no other rank.

    >>> ExitReport(3, "node17", 1, "RuntimeError: no such device", phase="update", time=1748736000.0).phase
    'update'
    """

    rank: int
    host: str
    code: int
    message: str
    phase: str | None
    time: float
    is_frozen: bool = False

    @classmethod
    def here(cls, code: int, message: str, phase: str | None = None) -> ExitReport:
        """The report of this process, now."""
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        return cls(rank_info().rank, host, code, message[:_LONGEST_MESSAGE], phase, time.time())


def write_exit_report(run_dir: Path, report: ExitReport) -> None:
    """Write ``report`` to the run folder if that exists and responds within ten seconds; otherwise do nothing."""

    def write() -> None:
        if run_dir.is_dir():
            with atomic_file(RunFolder(run_dir).end(report.rank)) as temporary:
                temporary.write_text(json.dumps(asdict(report)) + "\n")

    write_if_responsive(write)


def read_exit_reports(run_dir: Path) -> list[ExitReport]:
    """The run folder's exit reports, earliest first, also of ranks that their backstop ended. Malformed files are ignored.

    >>> import tempfile
    >>> run_dir = Path(tempfile.mkdtemp())
    >>> for rank, seconds in ((0, 12.5), (1, 11.0)):
    ...     write_exit_report(run_dir, ExitReport(rank, "n1", 70, "hung", "update", seconds))
    >>> [(report.rank, report.code, report.phase) for report in read_exit_reports(run_dir)]
    [(1, 70, 'update'), (0, 70, 'update')]
    """
    reports = []
    for path in RunFolder(run_dir).logs.glob("end_rank*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            reports.append(_report(path.read_text()))
    for path in RunFolder(run_dir).logs.glob("phase_rank*.txt"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            head, _, stacks = path.read_text(errors="replace").partition("\n")
            if stacks.strip():
                reports.append(replace(_report(head), time=path.stat().st_mtime))
    return sorted(reports, key=lambda report: report.time)


def _report(text: str) -> ExitReport:
    """The report in ``text``. Raises ``ValueError`` or ``TypeError`` if it is none."""
    report = ExitReport(**parse_json(text))
    kinds = (report.rank, int), (report.host, str), (report.code, int), (report.message, str), (report.time, (int, float))
    if not all(isinstance(value, kind) for value, kind in kinds) or not isinstance(report.phase, (str, type(None))):
        raise TypeError("a field of another type")
    return report


def remove_exit_report(run_dir: Path, rank: int) -> None:
    """Delete the rank's last exit report, fault and stacks. Reporting an unwritable folder is left to others."""
    folder = RunFolder(run_dir)
    for path in (folder.end(rank), folder.fault(rank), folder.stall(rank)):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def note_phase(error: BaseException, phase: str) -> None:
    """Attach to ``error`` the phase of the run in which it was raised, the innermost if they are nested."""
    if phase_of(error) is None:
        error.run_phase = phase  # type: ignore[attr-defined]


def phase_of(error: BaseException) -> str | None:
    """The phase that :func:`note_phase` attached."""
    return getattr(error, "run_phase", None)


def write_if_responsive(write: Callable[[], None]) -> None:
    """Call ``write`` and wait at most ten seconds for it. An :class:`OSError` is swallowed: the process is about to end."""

    def attempt() -> None:
        with contextlib.suppress(OSError):
            write()

    thread = threading.Thread(target=attempt, name="exit report", daemon=True)
    thread.start()
    thread.join(_LONGEST_WRITE)
