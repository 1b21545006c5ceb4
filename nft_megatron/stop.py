"""Requests to save and leave: a signal, or a file named ``stop`` in the run folder."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from types import FrameType

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """Watches for them from its making on. A second Ctrl-C ends the process at once, as usual; no finished step is lost."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._signal: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log.warning("%s: saving and leaving after this step", self._signal)

    def reason(self) -> str | None:
        """What asked to stop, None while nothing did."""
        return self._signal or (f"the file {self._file}" if self._file.exists() else None)

    def clear(self) -> None:
        """The request has been honoured: the next start is not to stop again."""
        self._file.unlink(missing_ok=True)
