"""Progress of a conversion: bytes, bytes per second, time left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from nft_megatron.observe.progress import SECONDS_BETWEEN_LINES, format_duration


class Meter:
    """A bar on a terminal, elsewhere a line every ``SECONDS_BETWEEN_LINES``. A context manager that threads may share."""

    def __init__(self, title: str, num_bytes: int, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._title, self._total, self._console, self._clock = title, num_bytes, console, clock
        self._done = 0
        self._start = self._last_line = clock()
        self._lock = threading.Lock()
        self._bar = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=36),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(title, total=num_bytes)

    def advance(self, num_bytes: int) -> None:
        """Count that many more as done."""
        if self._bar is not None:
            self._bar.advance(self._task, num_bytes)
            return
        with self._lock:
            self._done += num_bytes
            now = self._clock()
            if now - self._last_line >= SECONDS_BETWEEN_LINES:
                self._last_line = now
                speed = self._done / (now - self._start)
                left = format_duration(max(self._total - self._done, 0) / speed)
                line = (
                    f"{self._title}  {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB  {speed / 1e9:.2f} GB/s  {left} left"
                )
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Meter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
