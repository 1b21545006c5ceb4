"""One deadline for several calls in a row."""

from __future__ import annotations

import time
from dataclasses import dataclass

_SHORTEST = 1e-3


@dataclass(frozen=True)
class Deadline:
    """A moment of the monotonic clock by which everything must be done.

    >>> Deadline.of(0.0).has_passed, Deadline.of(3600.0).has_passed
    (True, False)
    >>> 3599.0 < Deadline.of(3600.0).left <= 3600.0
    True
    """

    until: float

    @classmethod
    def of(cls, seconds: float) -> Deadline:
        """The deadline ``seconds`` from now."""
        return cls(time.monotonic() + seconds)

    @property
    def has_passed(self) -> bool:
        return time.monotonic() >= self.until

    @property
    def left(self) -> float:
        """Seconds left; a millisecond when it has passed, so that a call times out: 0 means "never blocks" to a socket."""
        return max(_SHORTEST, self.until - time.monotonic())
