"""Keeps a step of servers running on every rollout node."""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence

from nft_megatron.base.backoff import Backoff
from nft_megatron.base.deadline import Deadline

log = logging.getLogger(__name__)

_LONG_ENOUGH = 300.0
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
        backoff = Backoff()
        while not self._closing.is_set():
            long_enough = Deadline.of(_LONG_ENOUGH)
            step = subprocess.Popen(self._command(node), env=self._environment, stdin=subprocess.DEVNULL)
            while step.poll() is None and not self._closing.wait(_PAUSE):
                pass
            if self._closing.is_set():
                end_step(step, _END_SECONDS)
                return
            if long_enough.has_passed:
                backoff.reset()
            delay = backoff.next_delay()
            log.warning("servers on %s: srun exited with %d; restarting in %g s", node, step.returncode, delay)
            self._closing.wait(delay)

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
