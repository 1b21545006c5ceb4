"""Why an attempt ended, from what its ranks and srun left behind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nft_megatron.base.errors import EXIT_STALLED, EXIT_STOPPED_EARLY, EXIT_USER_ERROR
from nft_megatron.base.run_folder import TAKEN
from nft_megatron.lifecycle.exit_report import ExitReport

_SRUN_LINE = re.compile(r"^srun: error: (?P<node>\S+): tasks? (?P<tasks>[\d,-]+): (?P<what>.+)$", re.MULTILINE)
_EXITED = "Exited with exit code"
_HARDWARE = re.compile(r"CUDA|ECC|Xid|NVML|cuBLAS|uncorrectable|Bus error|Input/output error", re.IGNORECASE)
_ECHO = re.compile(r"connection (closed|reset|refused)|broken pipe|peer|remote process", re.IGNORECASE)
_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
"""A collective's deadline, which may come before the watchdog's."""
_TAIL = 65536


@dataclass(frozen=True)
class Cause:
    """``code`` is the run's exit code as in ``nft_megatron.base.errors``; ``blamed`` are nodes that may be at fault."""

    code: int
    text: str
    blamed: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskEnd:
    """A line of srun about failed tasks."""

    node: str
    ranks: tuple[int, ...]
    what: str


def find_cause(code: int, reports: Sequence[ExitReport], log: str, node_of_rank: Sequence[str]) -> Cause:
    """The cause of a trainer step's exit with ``code``.

    ``reports`` are the ranks' exit reports, oldest first; ``log`` is the end of their combined output, with srun's lines;
    ``node_of_rank[r]`` is rank r's node. A failing rank takes the others with it, so the order tells cause from echo.
    """
    if code == 0:
        return Cause(0, "all steps are done")
    for report in reports:
        if report.code == EXIT_USER_ERROR and TAKEN in report.message:
            return Cause(1, report.message)  # an earlier attempt's rank 0, on a node thought lost
        if report.code == EXIT_USER_ERROR:
            return Cause(EXIT_USER_ERROR, report.message)
    if code == EXIT_USER_ERROR:  # before the run folder was known
        return Cause(code, _last_message(log))
    if code == EXIT_STOPPED_EARLY:
        return Cause(code, next((report.message for report in reports), _last_message(log)))
    if reports and all(report.code == EXIT_STOPPED_EARLY for report in reports):  # one took too long to exit, and was killed
        return Cause(EXIT_STOPPED_EARLY, reports[0].message)
    ends = task_ends(log)
    if ends and _EXITED not in ends[0].what:
        ranks = ", ".join(map(str, ends[0].ranks))
        return Cause(1, f"rank {ranks} on {ends[0].node}: {ends[0].what}", (ends[0].node,))
    if frozen := next((report for report in reports if report.is_frozen), None):
        return Cause(EXIT_STALLED, f"{frozen.message} (on {frozen.host})", (frozen.host,))
    waited = [report for report in reports if report.code == EXIT_STALLED or _TIMED_OUT.search(report.message)]
    if waited:
        return _stall(waited, reports, node_of_rank)
    faults = [report for report in reports if report.code not in (0, EXIT_STOPPED_EARLY)]
    if faults:
        first = next((fault for fault in faults if not _ECHO.search(fault.message)), faults[0])
        blamed = (first.host,) if _HARDWARE.search(first.message) else ()
        return Cause(1, f"rank {first.rank} on {first.host}: {first.message}", blamed)
    return Cause(1, f"the trainers exited with {code} without an exit report: {_last_message(log)}")


def task_ends(log: str) -> list[TaskEnd]:
    """srun's errors about tasks, in order.

    >>> task_ends("srun: error: n2: tasks 2-3: Killed")
    [TaskEnd(node='n2', ranks=(2, 3), what='Killed')]
    """
    return [TaskEnd(found["node"], _numbers(found["tasks"]), found["what"].strip()) for found in _SRUN_LINE.finditer(log)]


def read_tail(path: Path) -> str:
    """The end of a log file; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _stall(waited: Sequence[ExitReport], reports: Sequence[ExitReport], node_of_rank: Sequence[str]) -> Cause:
    """Ranks that ``waited`` in vain waited for those without a report: these were stopped, or hang where no watchdog looks."""
    phase = f"in phase {waited[0].phase}" if waited[0].phase else ""
    silent = sorted(set(range(len(node_of_rank))) - {report.rank for report in reports})
    if not silent:
        return Cause(EXIT_STALLED, f"all ranks hung {phase}: {waited[0].message}")
    where = tuple(sorted({node_of_rank[rank] for rank in silent}))
    who, others = (", ".join(map(str, ranks)) for ranks in (silent, sorted(report.rank for report in waited)))
    return Cause(
        EXIT_STALLED, f"rank {who} on {', '.join(where)} gave no sign of life while rank {others} waited {phase}", where
    )


def _numbers(text: str) -> tuple[int, ...]:
    """``0,2-4`` as (0, 2, 3, 4)."""
    parts = (part.split("-") for part in text.split(","))
    return tuple(number for part in parts for number in range(int(part[0]), int(part[-1]) + 1))


def _last_message(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith("srun:")]
    own = [line.removeprefix("nft-megatron: ") for line in lines if line.startswith("nft-megatron: ")]
    return (own or lines or ["nothing was printed"])[-1]
