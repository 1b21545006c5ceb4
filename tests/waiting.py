"""Waiting for what happens in another thread or process, never for longer than it may take."""

import time


def until(condition, seconds: float = 240.0, process=None) -> None:
    """Return once ``condition()`` holds; it fails after ``seconds``, and when ``process`` ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {seconds:g} s"
        assert process is None or process.is_running, "the process ended before it happened"
        time.sleep(0.02)
