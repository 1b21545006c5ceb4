"""A stream of answers from an engine that takes no work while it generates: all that waits is asked in one wave."""

from __future__ import annotations

import queue
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import Future
from typing import Protocol

from nft_megatron.base.background import in_background
from nft_megatron.base.records import Completion, Request, Sampling


class _Engine(Protocol):
    version: int

    def generate(self, requests: Sequence[Request], sampling: Sampling, given_up: Container[int]) -> Iterator[Completion]: ...


class WaveStream:
    """An :class:`~nft_megatron.rollout.engine.AnswerStream` over calls of ``generate``, each on a thread.

    A wave does not wait for its reader, so that it ends, and new weights have their turn, whether anybody reads or not.
    """

    def __init__(self, engine: _Engine, sampling: Sampling) -> None:
        self._engine, self._sampling = engine, sampling
        self._waiting: list[Request] = []
        self._wave: Future[None] | None = None
        self._answers: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        self._asked: set[int] = set()  # in the current wave
        self._given_up: set[int] = set()

    @property
    def version(self) -> int:
        return self._engine.version

    def ask(self, requests: Sequence[Request]) -> None:
        self._waiting += requests

    def next(self, timeout: float) -> Completion | None:
        if self._wave is not None and self._wave.done():
            self._wave.result()
            self._wave = None
        if self._wave is None and self._waiting:
            wave, self._waiting = self._waiting, []
            self._wave = in_background("wave", lambda: self._run(wave))
            self._asked = {request.request_id for request in wave}
        try:
            return self._answers.get(timeout=timeout)
        except queue.Empty:
            return None

    def close(self) -> None:
        self._waiting = []
        self._given_up |= self._asked

    def _run(self, wave: Sequence[Request]) -> None:
        for completion in self._engine.generate(wave, self._sampling, self._given_up):
            self._answers.put(completion)
