"""Summaries of a run's rows: the numbers that the report and the plots share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nft_megatron.base.errors import UserError
from nft_megatron.base.untrusted import parse_json
from nft_megatron.observe.metrics import PHASES, MetricsRow, read_metrics

# Updating includes what an update needs first: the old log-probs.
TIME_GROUPS: dict[str, tuple[str, ...]] = {
    "Generating": ("generate",),
    "Verifying": ("verify",),
    "Updating": ("prepare", "update"),
    "Everything else": ("publish", "ledger", "evaluate", "save", "other"),
}


def load_rows(run_dir: Path | str) -> list[MetricsRow]:
    """The run's metrics; none before its first step has finished.

    Raises:
        UserError: no such folder, or no run has left anything in it.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError("RUN", run_dir, "no such folder", "pass the run_dir of a run")
    rows = read_metrics(run_dir)
    if not rows and not any((run_dir / name).exists() for name in ("config.yaml", "ledger", "logs")):
        raise UserError("RUN", run_dir, "holds no run", "pass the run_dir of a run")
    return rows


def last_words(run_dir: Path) -> str:
    """What the rank that ended first said, with its exit code; empty if none has left a report."""
    reports = []
    for path in (run_dir / "logs").glob("end_rank*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            report = parse_json(path.read_text(encoding="utf-8"))
            reports.append((float(report["time"]), f"exit code {report['code']}: {report['message']}"))
    return min(reports)[1] if reports else ""


def finite_points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of every row that has a finite ``name``."""
    return [(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])]


def held_out_points(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(rollout steps done, held-out accuracy) in order; 0 is the model before the first update.

    >>> held_out_points([{"step": 1, "eval_accuracy_initial": 0.2, "eval_accuracy": 0.3}, {"step": 2, "eval_accuracy": 0.5}])
    [(0, 0.2), (1, 0.3), (2, 0.5)]
    """
    initial = [(step - 1, accuracy) for step, accuracy in finite_points(rows, "eval_accuracy_initial")]
    measured = [{**row, "step": row.get("eval_step", row["step"])} for row in rows]
    return initial + finite_points(measured, "eval_accuracy")


def phase_seconds(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds per phase, summed over all rollout steps."""
    return {phase: math.fsum(row.get(f"time/{phase}", 0.0) for row in rows) for phase in PHASES}
