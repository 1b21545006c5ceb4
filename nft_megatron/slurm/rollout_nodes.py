"""Keeps a step of servers running on every rollout node."""

from __future__ import annotations

import logging
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence

log = logging.getLogger(__name__)

_LONG_ENOUGH = 300.0
_FIRST_DELAY, _LONGEST_DELAY = 1.0, 60.0
_END_SECONDS = 20.0
_PAUSE = 0.5


class RolloutNodes:
    """One srun per node, restarted when it ends: after 1 s, 2 s, … 60 s, and from 1 s again once it ran for five minutes.

    ``command`` gives the step of a node. Meanwhile the trainers continue with the remaining servers.
    """

    def __init__(self, nodes: Sequence[str], command: Callable[[str], list[str]], environment: Mapping[str, str]) -> None:
        self._command, self._environment = command, dict(environment)
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._keep, args=(node,), name=f"rollout-{node}") for node in nodes]
        for thread in self._threads:
            thread.start()

    def _keep(self, node: str) -> None:
        delay = _FIRST_DELAY
        while not self._closing.is_set():
            started = time.monotonic()
            step = subprocess.Popen(self._command(node), env=self._environment, stdin=subprocess.DEVNULL)
            while step.poll() is None and not self._closing.wait(_PAUSE):
                pass
            if self._closing.is_set():
                end_step(step, _END_SECONDS)
                return
            if time.monotonic() - started > _LONG_ENOUGH:
                delay = _FIRST_DELAY
            log.warning("servers on %s: srun exited with %d; restarting in %g s", node, step.returncode, delay)
            self._closing.wait(delay)
            delay = min(2 * delay, _LONGEST_DELAY)

    def close(self) -> None:
        """End all steps, within about twenty seconds."""
        self._closing.set()
        for thread in self._threads:
            thread.join(2 * _END_SECONDS)


def end_step(step: subprocess.Popen, seconds: float) -> None:
    """End an srun and its tasks: TERM ends them at once, without a chance to save."""
    step.terminate()
    try:
        step.wait(seconds)
    except subprocess.TimeoutExpired:
        step.kill()
        step.wait(seconds)
