"""Requests to save and leave: a signal to any rank, a file named ``stop`` in the run folder, the end of the job's time."""

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
    """What asked this rank to stop. ``file`` is looked at where it is given, and ``limit`` may be reached: on rank 0."""

    def __init__(self, file: Path | None, limit: TimeLimit | None = None) -> None:
        self._file = file
        self.limit = limit or TimeLimit(None, 0.0)
        self._signal: str | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take the signals over inside the ``with`` block.

        After the first one a Ctrl-C ends the process at once, as usual; no finished step is lost.
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
            log.warning("%s: saving and leaving after this step", self._signal)

    def reason(self) -> str | None:
        """What asked to stop, None while nothing did."""
        if self._signal is not None:
            return self._signal
        if self._file is not None and self._file.exists():
            return f"the file {self._file}"
        return self.limit.reason()

    def clear(self) -> None:
        """The request has been honoured: the next start is not to stop again."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
