"""Garbage collection at chosen moments.

Python collects whenever enough objects have been made, on each rank at another moment. A rank that collects lets all others
wait in the next collective, and a large heap takes seconds. So within an update nothing is collected, and all ranks collect
after it.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Inside, collections skip what exists now: a model, its libraries. Afterwards they find it again, and cycles that hold
    process groups must be found before the interpreter exits."""
    gc.collect()
    is_first = gc.get_freeze_count() == 0
    if is_first:
        gc.freeze()
    try:
        yield
    finally:
        if is_first:
            gc.unfreeze()


@contextlib.contextmanager
def collected_afterwards() -> Iterator[None]:
    """Collect nothing inside, everything at the end.

    >>> with collected_afterwards():
    ...     gc.isenabled()
    False
    >>> gc.isenabled()
    True
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        gc.collect()
