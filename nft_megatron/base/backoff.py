"""How long to wait before the next attempt at something that keeps failing."""

from __future__ import annotations


class Backoff:
    """Delays in seconds that double from ``first`` up to ``longest``, and start over after a success. Without a clock.

    >>> backoff = Backoff(first=1.0, longest=5.0)
    >>> [backoff.next_delay() for _ in range(4)]
    [1.0, 2.0, 4.0, 5.0]
    >>> backoff.reset()
    >>> backoff.next_delay()
    1.0
    """

    def __init__(self, first: float = 1.0, longest: float = 60.0) -> None:
        self._first, self._longest = first, longest
        self._next = first

    def next_delay(self) -> float:
        """What to wait before the attempt after this failure."""
        delay = self._next
        self._next = min(2 * delay, self._longest)
        return delay

    def reset(self) -> None:
        """The last attempt succeeded."""
        self._next = self._first
