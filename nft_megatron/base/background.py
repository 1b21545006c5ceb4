"""Work in a background thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(name: str, action: Callable[[], T]) -> Future[T]:
    """Run ``action`` in a thread that does not outlive the process's main thread.

    >>> in_background("sum", lambda: 1 + 2).result(10)
    3
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
