"""The fleet as one engine: many requests, several callers at once, servers that come and go.

All HTTP and bookkeeping happen in one event loop on its own thread (``request_loop.py``). ``generate`` hands over its requests
and reads a queue; what one server fails to finish is requested elsewhere (``dispatch.py``). Faults cost time, not answers.

An answer counts only if it is one to its request (``rollout/answer_rule.py``) and the weights behind all its tokens are known:
published through this engine, and no older than what the server was believed to hold when it got the request. Any other answer
is discarded and requested again, of another server if there is one, and its server is reported. While new weights are being
published, answers that already carry them wait until publication succeeds.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import queue
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nft_megatron.base.records import Completion, Request, Sampling
from nft_megatron.rollout.answer_rule import AnswerRule
from nft_megatron.rollout.engine import EngineFault, check_requests
from nft_megatron.rollout.fleet.call import GenerateCall
from nft_megatron.rollout.fleet.dispatch import Dispatcher
from nft_megatron.rollout.fleet.metrics import fleet_metrics
from nft_megatron.rollout.fleet.request_loop import POLL_SECONDS, Fleet, RequestLoop
from nft_megatron.rollout.fleet.usage import FleetUsage
from nft_megatron.weights import read_shape

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_LOOP_SECONDS = 30.0  # deadline for an action in the event loop


class FleetEngine:
    """``Engine`` over the servers of ``fleet``; closing it closes the fleet. ``model_folder`` gives the bounds of requests.

    ``budget_tokens``: most outstanding tokens per server, counting prompts and expected answers. ``max_attempts``: how often an
    answer is requested before it comes back as ``abort``. ``silence_seconds``: a server that has work and sends nothing for
    this long has failed. ``servers_seconds``: longest wait for a fleet that can serve. ``keep_partial``: an answer that a
    server began continues on another (``partial.py``) instead of beginning again with its seed.

    Answers with consecutive seeds share one HTTP request. A seed gives the same answer on every server, alone or among others,
    unless the rounding of logits moves a draw across the boundary between two tokens.
    """

    overlaps = True

    def __init__(
        self,
        fleet: Fleet,
        model_folder: Path | str,
        *,
        budget_tokens: int = 1_000_000,
        max_attempts: int = 4,
        silence_seconds: float = 120.0,
        servers_seconds: float = 600.0,
        keep_partial: bool = False,
    ) -> None:
        self._fleet, self._servers_seconds = fleet, servers_seconds
        self._model_folder = Path(model_folder)
        self._shape = read_shape(self._model_folder)
        self._has_weights = False
        self.version = -1
        self._load_lock, self._close_lock = threading.Lock(), threading.Lock()
        self._numbers = itertools.count()
        _allow_many_connections()
        self._event_loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._event_loop.run_forever, name="fleet engine", daemon=True)
        self._thread.start()
        dispatcher = Dispatcher(budget_tokens=budget_tokens, max_attempts=max_attempts)
        self._request_loop = self._do(lambda: RequestLoop(fleet, dispatcher, silence_seconds, keep_partial))
        self._watch = asyncio.run_coroutine_threadsafe(self._request_loop.watch(), self._event_loop)

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        with self._load_lock:
            self._do(lambda: self._request_loop.begin_load(version))
            succeeded = False
            try:
                fingerprint = self._fleet.publish(tensors, version)
                succeeded = True
                self.version = version
                return fingerprint
            finally:
                self._has_weights = succeeded
                self._do(lambda: self._request_loop.end_load(version, succeeded))

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, given_up: Container[int] = frozenset()
    ) -> Iterator[Completion]:
        return self._answers(self._call(requests, sampling), given_up)

    def open_stream(self, sampling: Sampling) -> FleetStream:
        call = self._call([], sampling)
        self._tell(lambda: self._request_loop.begin(call))
        return FleetStream(self, call)

    def take_metrics(self) -> FleetUsage:
        """What the servers did since the last call."""
        return self._do(self._request_loop.take_usage)

    def metrics(self) -> dict[str, float | int | list[int]]:
        """:func:`~nft_megatron.rollout.fleet.metrics.fleet_metrics` since the last call of this or of ``take_metrics``."""
        return fleet_metrics(self.take_metrics(), self._fleet.stats())

    def close(self) -> None:
        with self._close_lock:
            if self._event_loop.is_closed():
                return
            self._watch.cancel()
            try:
                asyncio.run_coroutine_threadsafe(self._request_loop.close(), self._event_loop).result(_LOOP_SECONDS)
                self._event_loop.call_soon_threadsafe(self._event_loop.stop)
                self._thread.join(_LOOP_SECONDS)
                self._event_loop.close()
            finally:
                self._fleet.close()

    def _call(self, requests: Sequence[Request], sampling: Sampling) -> GenerateCall:
        self._check(requests, sampling)
        rule = AnswerRule(sampling, self._shape.vocab_size, self._model_folder)
        return GenerateCall(next(self._numbers), requests, sampling, rule)

    def _check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        if not self._has_weights:
            raise EngineFault("the fleet has no weights: load() them before generate()")
        check_requests(requests, sampling, self._shape.vocab_size, self._shape.max_positions)

    def _answers(self, call: GenerateCall, given_up: Container[int]) -> Iterator[Completion]:
        num_open = Counter({request.request_id: len(request.seeds) for request in call.requests.values() if request.seeds})

        def is_given_up() -> bool:
            return all(request_id in given_up for request_id in num_open)

        self._fleet.wait_for_servers(self._servers_seconds, is_given_up)
        self._tell(lambda: self._request_loop.begin(call))
        looked_at = time.monotonic()
        try:
            while num_open:
                if time.monotonic() - looked_at > POLL_SECONDS:
                    for request_id in [request_id for request_id in num_open if request_id in given_up]:
                        self._give_up(call, num_open, request_id)
                    looked_at = time.monotonic()
                    continue
                try:
                    item = call.answers.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    if self._do(self._request_loop.is_stranded):
                        self._fleet.wait_for_servers(self._servers_seconds, is_given_up)
                    continue
                if isinstance(item, Exception):
                    raise item
                completion, server = item
                if completion.request_id in num_open and completion.request_id in given_up:
                    self._give_up(call, num_open, completion.request_id)
                if completion.request_id not in num_open:
                    self._tell(functools.partial(self._request_loop.waste, completion, server))
                    continue
                num_open[completion.request_id] -= 1
                if num_open[completion.request_id] == 0:
                    del num_open[completion.request_id]
                yield completion
        finally:
            self._tell(lambda: self._request_loop.end(call))

    def _give_up(self, call: GenerateCall, num_open: Counter[int], request_id: int) -> None:
        del num_open[request_id]
        self._tell(lambda: self._request_loop.give_up(call, request_id))

    def _tell(self, action: Callable[[], None]) -> None:
        """Schedule ``action`` in the event loop; do not wait for it."""
        if not self._event_loop.is_closed():
            self._event_loop.call_soon_threadsafe(action)

    def _do(self, action: Callable[[], T]) -> T:
        """Run ``action`` in the event loop and return its result."""

        async def run() -> T:
            return action()

        return asyncio.run_coroutine_threadsafe(run(), self._event_loop).result(_LOOP_SECONDS)


class FleetStream:
    """An :class:`~nft_megatron.rollout.engine.AnswerStream` of a fleet's engine."""

    def __init__(self, engine: FleetEngine, call: GenerateCall) -> None:
        self._engine, self._call = engine, call
        self._num_open: Counter[int] = Counter()

    @property
    def version(self) -> int:
        return self._engine.version

    def ask(self, requests: Sequence[Request]) -> None:
        engine = self._engine
        engine._check(requests, self._call.sampling)
        self._num_open.update({request.request_id: len(request.seeds) for request in requests})
        engine._tell(lambda: engine._request_loop.add(self._call, requests))

    def next(self, timeout: float) -> Completion | None:
        engine, loop = self._engine, self._engine._request_loop
        try:
            item = self._call.answers.get(timeout=timeout)
        except queue.Empty:
            if self._num_open and bool(engine._do(loop.is_stranded)):
                engine._fleet.wait_for_servers(engine._servers_seconds)
            return None
        if isinstance(item, Exception):
            raise item
        request_id = item[0].request_id
        self._num_open[request_id] -= 1
        if not self._num_open[request_id]:
            del self._num_open[request_id]
            engine._tell(lambda: loop.forget(self._call, request_id))
        return item[0]

    def close(self) -> None:
        self._engine._tell(lambda: self._engine._request_loop.end(self._call))


def _allow_many_connections() -> None:
    """Raise the limit of open files: each sub-request in progress is a connection, and the usual 1,024 are soon used up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
