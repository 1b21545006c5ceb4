"""Collecting ahead: a thread on rank 0 collects the steps to come while the ranks train.

Step k trains the weights of version k − 1. With ``rollout.max_staleness`` s its answers may be of version k − 1 − s and later,
so its collecting may begin as soon as the engine holds that version. Weights that arrive in the middle are used from then on.
What is collected is on the disk, so the thread has nothing to hand over but where it stands.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace

from nft_megatron.base.background import in_background
from nft_megatron.base.errors import StoppedEarly
from nft_megatron.collect.collector import Collector, CollectorState, Dataset
from nft_megatron.observe.metrics import MetricsRow, PhaseTimer
from nft_megatron.observe.progress import Progress

_POLL_SECONDS = 0.5  # between looks at a request to stop
_CLOSE_SECONDS = 10.0


class AsyncCollector:
    """Collects steps ``state``'s next to ``last_step``; :meth:`take` hands them out in order.

    ``version`` is that of the weights which the engine holds; :meth:`published` tells of newer ones.
    """

    def __init__(self, collector: Collector, state: CollectorState, *, version: int, last_step: int) -> None:
        client = replace(collector.client, timer=PhaseTimer(), progress=Progress())
        self._collector = replace(collector, client=client, interrupted=self._closing_reason)
        self._version, self._first_step, self._last_step = version, version + 1, last_step
        self._changed = threading.Condition()
        self._collected: dict[int, tuple[Dataset, CollectorState]] = {}
        self._is_closing = False
        self._work = in_background("collect-ahead", lambda: self._run(state))
        self._work.add_done_callback(lambda _: self._wake())

    def published(self, version: int) -> None:
        """The engine holds the weights of ``version``."""
        with self._changed:
            self._version = version
            self._changed.notify_all()

    def take(self, step: int, deadline_seconds: float, interrupted: Callable[[], str | None]) -> tuple[Dataset, CollectorState]:
        """What :meth:`Collector.collect` returns of the step. Waits for it at most ``deadline_seconds``.

        Raises what stopped the collecting; :class:`StoppedEarly` when ``interrupted`` gives a reason meanwhile;
        :class:`TimeoutError` after the deadline.
        """
        begin = time.monotonic()
        with self._changed:
            while step not in self._collected:
                if self._work.done():
                    self._work.result()
                if reason := interrupted():
                    raise StoppedEarly(f"stopped while step {step} was collected by {reason}; the same command goes on")
                if time.monotonic() - begin > deadline_seconds:
                    raise TimeoutError(f"step {step} was not collected within {deadline_seconds:.0f} s")
                self._changed.wait(_POLL_SECONDS)
            return self._collected.pop(step)

    def close(self) -> None:
        """End the thread; finished groups are on the disk. An engine that is silent may keep it until it is closed itself."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        wait([self._work], _CLOSE_SECONDS)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _closing_reason(self) -> str | None:
        return "the end of the run" if self._is_closing else None

    def _run(self, state: CollectorState) -> None:
        for step in range(self._first_step, self._last_step + 1):
            with self._changed:
                oldest = step - 1 - self._collector.settings.max_staleness
                begin = time.monotonic()
                self._changed.wait_for(lambda oldest=oldest: self._version >= oldest or self._is_closing)  # type: ignore[misc]
                waited = time.monotonic() - begin
                if self._is_closing:
                    return
            dataset, state = self._collector.collect(step, state)
            timings: MetricsRow = {"ahead/collect": time.monotonic() - begin - waited, "ahead/wait": waited}
            with self._changed:
                self._collected[step] = replace(dataset, metrics=dataset.metrics | timings, generated_tokens=0), state
                self._changed.notify_all()
