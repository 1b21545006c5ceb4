"""Lets several threads take turns at an engine that allows no overlap.

Collection, evaluation and weight sync call it from different threads. A ``load`` runs before any ``generate`` that has not
started, so new weights wait only for the answers in progress.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from nft_megatron.base.records import Completion, Request, Sampling
from nft_megatron.rollout.engine import Engine, EngineFault
from nft_megatron.rollout.waves import WaveStream

if TYPE_CHECKING:
    import torch


class ExclusiveEngine:
    """Wraps an ``Engine`` that allows no overlap. A call waits at most ``deadline_seconds`` for its turn."""

    overlaps = True

    def __init__(self, engine: Engine, deadline_seconds: float) -> None:
        self._engine, self._deadline_seconds = engine, deadline_seconds
        self._turn = threading.Condition()
        self._is_busy = False
        self._num_loads_waiting = 0
        self.version = -1

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        with self._exclusive(is_load=True):
            fingerprint = self._engine.load(tensors, version)
            self.version = version
            return fingerprint

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, given_up: Container[int] = frozenset()
    ) -> Iterator[Completion]:
        with self._exclusive(is_load=False):
            yield from self._engine.generate(requests, sampling, given_up)

    def open_stream(self, sampling: Sampling) -> WaveStream:
        return WaveStream(self, sampling)

    def close(self) -> None:
        self._engine.close()

    @contextlib.contextmanager
    def _exclusive(self, *, is_load: bool) -> Iterator[None]:
        with self._turn:
            self._num_loads_waiting += is_load
            is_free = self._turn.wait_for(
                lambda: not self._is_busy and (is_load or not self._num_loads_waiting), self._deadline_seconds
            )
            self._num_loads_waiting -= is_load
            if not is_free:
                raise EngineFault(f"the engine was busy with other answers for {self._deadline_seconds:.0f} s")
            self._is_busy = True
        try:
            yield
        finally:
            with self._turn:
                self._is_busy = False
                self._turn.notify_all()
