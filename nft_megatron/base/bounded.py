"""A bound on the time and memory of code that somebody else wrote, such as a chat template."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType


class BoundError(Exception):
    """The bound on processor time was reached."""


@contextlib.contextmanager
def bounded(seconds: float, num_bytes: int) -> Iterator[None]:
    """Let the ``with`` block use ``seconds`` of this process's processor time and ``num_bytes`` more memory.

    Beyond that it raises :class:`BoundError` or ``MemoryError``. Processor time, so that a busy machine changes nothing. Only
    the main thread can be interrupted.

    >>> with bounded(0.01, 1 << 30):
    ...     while True:
    ...         pass
    Traceback (most recent call last):
    nft_megatron.base.bounded.BoundError: took more than 0.01 s of processor time
    """

    def give_up(number: int, frame: FrameType | None) -> None:
        raise BoundError(f"took more than {seconds:g} s of processor time")

    before = resource.getrlimit(resource.RLIMIT_AS)
    most = _address_space() + num_bytes
    if before[0] == resource.RLIM_INFINITY or most < before[0]:
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGVTALRM, give_up) if is_main else None
    try:
        if is_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)  # again, in case the first is swallowed
        yield
    finally:
        if is_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, handler or signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _address_space() -> int:
    """Bytes of this process's address space in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
