"""Requests to save and exit: a signal to any rank, a file named ``stop`` in the run folder, the end of the job's time."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from nft_megatron.lifecycle.walltime import TimeLimit

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """Stop requests to this rank. On rank 0, ``file`` is checked too, and ``limit`` may be reached."""

    def __init__(self, file: Path | None, limit: TimeLimit | None = None) -> None:
        self._file = file
        self.limit = limit or TimeLimit(None, 0.0)
        self._signal: str | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Handle the signals inside the ``with`` block.

        After the first signal, Ctrl-C ends the process at once, as usual; no finished step is lost.
        """
        before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._file is not None:
            log.warning("%s: saving and exiting after this step", self._signal)

    def request(self) -> str | None:
        """The signal or the file that requested the stop; None if there is neither."""
        if self._signal is not None:
            return self._signal
        return f"the file {self._file}" if self._file is not None and self._file.exists() else None

    def reason(self) -> str | None:
        """What requested the stop, the end of the job's time included; None if nothing has."""
        return self.request() or self.limit.reason()

    def clear(self) -> None:
        """The request has been honoured: the next start must not stop again."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
