"""Collecting ahead: a thread on rank 0 collects upcoming steps while the ranks train.

Step k trains the weights of version k − 1. With ``rollout.max_staleness`` s its answers may come from version k − 1 − s or
later, so collection may start as soon as the engine holds that version. Weights that arrive midway are used from then on. The
answers are on disk, so the thread hands over only metrics and its state.
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
    """Collects the steps ``version`` + 1 to ``last_step``, starting from ``state``; :meth:`take` returns them in order.

    ``version`` is that of the weights that the engine holds; :meth:`published` announces newer ones.
    """

    def __init__(self, collector: Collector, state: CollectorState, *, version: int, last_step: int) -> None:
        client = replace(collector.client, timer=PhaseTimer(), progress=Progress())
        self._collector = replace(collector, client=client, interrupted=self._closing_reason)
        self._version, self._first_step, self._last_step = version, version + 1, last_step
        self._changed = threading.Condition()
        self._collected: dict[int, tuple[Dataset, CollectorState]] = {}
        self._is_closing = False
        self._work = in_background("collect-ahead", lambda: self._collect(state))
        self._work.add_done_callback(lambda _: self._wake())

    def published(self, version: int) -> None:
        """The engine holds the weights of ``version``."""
        with self._changed:
            self._version = version
            self._changed.notify_all()

    def take(self, step: int, deadline_seconds: float, interrupted: Callable[[], str | None]) -> tuple[Dataset, CollectorState]:
        """Return what :meth:`Collector.collect` returned for the step. Waits at most ``deadline_seconds`` for it.

        Raises whatever stopped the collection, :class:`StoppedEarly` if ``interrupted`` gives a reason while waiting, and
        :class:`TimeoutError` after the deadline.
        """
        begin = time.monotonic()
        with self._changed:
            while step not in self._collected:
                if self._work.done():
                    self._work.result()
                if reason := interrupted():
                    raise StoppedEarly(f"stopped while collecting step {step} by {reason}; the same command resumes it")
                if time.monotonic() - begin > deadline_seconds:
                    raise TimeoutError(f"step {step} was not collected within {deadline_seconds:.0f} s")
                self._changed.wait(_POLL_SECONDS)
            return self._collected.pop(step)

    def close(self) -> None:
        """End the thread; finished groups are on disk. A silent engine may delay it until the engine itself is closed."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        wait([self._work], _CLOSE_SECONDS)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _closing_reason(self) -> str | None:
        return "the end of the run" if self._is_closing else None

    def _collect(self, state: CollectorState) -> None:
        try:
            self._run(state)
        finally:
            self._collector.finish()

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
