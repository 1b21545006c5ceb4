"""What a run prints as it works: a live display on a terminal, single lines anywhere else. Ranks other than 0
hold the silent :class:`Progress`.

with open_progress(config.train.num_steps, first_step) as progress:
    progress.phase("generate", total=quota)       # begins a phase, and so ends the one before
    progress.advance(3)
    progress.step_done(metrics)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 30.0

_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))

# Name in a metrics row, label, how it is printed.
_SHOWN: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("accuracy", "accuracy", lambda value: f"{value:.1%}"),
    ("entropy", "entropy", lambda value: f"{value:.3f}"),
    ("loss", "loss", lambda value: f"{value:+.4f}"),
    ("eval_accuracy_initial", "held-out (initial)", lambda value: f"{value:.1%}"),
    ("eval_accuracy", "held-out", lambda value: f"{value:.1%}"),
)


class Progress:
    """The interface, and at the same time the silent one."""

    def phase(self, name: str, total: int | None = None) -> None:
        """Begin a phase of ``total`` parts; None where the number is not known."""

    def advance(self, count: int = 1) -> None:
        """``count`` more parts of the current phase are done."""

    def begin(self, step: int) -> None:
        """The set-up is done; ``step`` steps were done before this process. The remaining time is estimated from here."""

    def step_done(self, metrics: Mapping[str, Any]) -> None:
        """A rollout step has ended with this metrics row."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        """Release the terminal."""


def open_progress(num_steps: int, first_step: int = 0, *, console: Console | None = None) -> Progress:
    """The display that suits the console: :class:`LiveProgress` on a terminal, :class:`LineProgress` anywhere else.

    ``num_steps`` are the steps of the whole run, ``first_step`` the number of those done before this process.
    """
    console = console or Console()
    return (LiveProgress if console.is_terminal else LineProgress)(console, num_steps, first_step)


def format_duration(seconds: float) -> str:
    """A duration in its two largest units.

    >>> format_duration(8.26), format_duration(75), format_duration(3 * 3600 + 60), format_duration(49 * 3600)
    ('8.3 s', '1 min 15 s', '3 h 1 min', '2 d 1 h')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    (large, size), (small, part) = next(pair for pair in pairwise(_UNITS) if whole >= pair[0][1])
    return f"{whole // size} {large} {whole % size // part} {small}"


def time_left(seconds: float, first_step: int, step: int, num_steps: int) -> str:
    """The estimated remaining time at the pace of the steps since ``first_step``.

    >>> time_left(40.0, first_step=10, step=12, num_steps=20)
    '2 min 40 s left'
    """
    return f"{format_duration(seconds / (step - first_step) * (num_steps - step))} left"


def describe_step(metrics: Mapping[str, Any]) -> str:
    """The few numbers of a row that tell how a run is doing; absent and non-finite ones are omitted.

    >>> describe_step({"step": 3, "accuracy": 0.4567, "entropy": 0.31, "loss": -0.012, "learning_rate": 1e-6})
    'accuracy 45.7%  entropy 0.310  loss -0.0120'
    """
    shown = ((label, show, metrics.get(name)) for name, label, show in _SHOWN)
    return "  ".join(f"{label} {show(value)}" for label, show, value in shown if value is not None and math.isfinite(value))


class LineProgress(Progress):
    """One line per step; within a phase, a line whenever the last one is ``SECONDS_BETWEEN_LINES`` old."""

    def __init__(self, console: Console, num_steps: int, first_step: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._num_steps, self._done, self._clock = console, num_steps, first_step, clock
        self._first_step, self._start = first_step, clock()
        self._last_line = self._start
        self.phase("start")

    def phase(self, name: str, total: int | None = None) -> None:
        self._phase, self._total, self._count = name, total, 0
        self._print_if_due()

    def advance(self, count: int = 1) -> None:
        self._count += count
        self._print_if_due()

    def begin(self, step: int) -> None:
        self._done, self._first_step, self._start = step, step, self._clock()

    def step_done(self, metrics: Mapping[str, Any]) -> None:
        self._done = metrics["step"]
        took = f"  {format_duration(metrics['time/step'])}" if "time/step" in metrics else ""
        left = time_left(self._clock() - self._start, self._first_step, self._done, self._num_steps)
        self._print(self._done, f"{describe_step(metrics)}{took}  {left}")

    def _print_if_due(self) -> None:
        if self._clock() - self._last_line >= SECONDS_BETWEEN_LINES:
            of_total = f" of {self._total}" if self._total is not None else ""
            self._print(self._done + 1, f"{self._phase} {self._count}{of_total}")

    def _print(self, step: int, line: str) -> None:
        self._console.print(f"step {step}/{self._num_steps}  {line}", markup=False, highlight=False, soft_wrap=True)
        self._last_line = self._clock()


class LiveProgress(Progress):
    """Three lines at the foot of the terminal: the run, the current phase, the last numbers."""

    def __init__(self, console: Console, num_steps: int, first_step: int) -> None:
        self._shown: dict[str, Any] = {}
        self._bars = Bar(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=36),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
        )
        self._num_steps, self._first_step = num_steps, first_step
        self._start = time.monotonic()
        self._run = self._bars.add_task("step", total=num_steps, completed=first_step, note="")
        self._phase: TaskID = self._bars.add_task("start", total=None, note="")
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=8)

    def phase(self, name: str, total: int | None = None) -> None:
        self._bars.reset(self._phase, total=total, description=name)

    def advance(self, count: int = 1) -> None:
        self._bars.advance(self._phase, count)

    def begin(self, step: int) -> None:
        self._first_step, self._start = step, time.monotonic()
        self._bars.update(self._run, completed=step)

    def step_done(self, metrics: Mapping[str, Any]) -> None:
        left = time_left(time.monotonic() - self._start, self._first_step, metrics["step"], self._num_steps)
        self._bars.update(self._run, completed=metrics["step"], note=left)
        # The held-out accuracy stays visible until the next evaluation.
        self._shown.update(metrics)

    def _render(self) -> Table:
        lines = Table.grid()
        lines.add_row(self._bars)
        lines.add_row(Text(f"  {describe_step(self._shown)}"))
        return lines

    def __enter__(self) -> LiveProgress:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()
