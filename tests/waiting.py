"""Waiting for events in another thread or process. Limits guard only against hanging: no test asserts them."""

import time


def until(condition, seconds: float = 240.0, process=None):
    """Return the value of ``condition()`` once it is true. Fails after ``seconds``, or if ``process`` ends first."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"it did not happen within {seconds:g} s"
        assert process is None or process.is_running, "the process ended before it happened"
        time.sleep(0.02)
    return value


class Clock:
    """Replaces a module's ``time``: real time, to which a test adds what it does not want to wait for."""

    sleep = staticmethod(time.sleep)
    time = staticmethod(time.time)

    def __init__(self) -> None:
        self.added = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.added
