"""Turns: many threads at a time, or one alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Threads take a turn :meth:`together` with others, or :meth:`alone`; those that wait to be alone go first.

    How long a wait lasts depends on the turns of the others, which have deadlines of their own.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()  # of everything below
        self._num_together = 0
        self._num_waiting_alone = 0
        self._is_one_alone = False

    @property
    def num_waiting_alone(self) -> int:
        """How many threads wait to be alone."""
        return self._num_waiting_alone

    @contextmanager
    def together(self) -> Iterator[None]:
        """A turn beside others. Unblocked by: the end of every turn alone, also of those that still wait."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_one_alone and not self._num_waiting_alone)
            self._num_together += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_together -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A turn without others. Unblocked by: the end of all turns that have begun."""
        with self._changed:
            self._num_waiting_alone += 1
            self._changed.wait_for(lambda: not self._is_one_alone and not self._num_together)
            self._num_waiting_alone -= 1
            self._is_one_alone = True
        try:
            yield
        finally:
            with self._changed:
                self._is_one_alone = False
                self._changed.notify_all()
