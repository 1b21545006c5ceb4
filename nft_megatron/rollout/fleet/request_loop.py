"""The work in the event loop of the fleet's engine: send sub-requests, receive answers, check which weights they come from.

All methods run on the event loop's thread, so nothing needs a lock. A sub-request's life: assigned → sent → its answers are
read one by one → ended. Whatever its server does not finish, or is silent about for too long, returns to the dispatcher.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import aiohttp
import numpy as np

from nft_megatron.base.records import Completion, Request
from nft_megatron.rollout.engine import EngineFault
from nft_megatron.rollout.fleet.call import GenerateCall, Stream
from nft_megatron.rollout.fleet.client import (
    STREAM_INTERVAL,
    Progress,
    Refused,
    generate,
    make_body,
    runs_of_seeds,
)
from nft_megatron.rollout.fleet.dispatch import Dispatcher
from nft_megatron.rollout.fleet.member import Member
from nft_megatron.rollout.fleet.partial import PartialAnswer
from nft_megatron.rollout.fleet.session import ServerFault, open_session
from nft_megatron.rollout.fleet.supervisor import ServerStats
from nft_megatron.rollout.fleet.usage import FleetUsage, Meter
from nft_megatron.rollout.pool import aborted

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
"""Between two looks at the fleet and at what callers have given up."""

_SLOWEST = 5.0  # tokens per second and answer
_LONGEST_QUEUE = 30.0  # times silence_seconds that a sub-request may wait in the queue of a server that answers others
_MAX_UNREAD = 4096  # answers that a caller may leave unread before nothing more is sent for it


class Fleet(Protocol):
    """What the engine needs of the fleet; implemented by :class:`nft_megatron.rollout.fleet.fleet.Fleet`."""

    def serving(self) -> list[Member]: ...
    def report(self, member: Member, ok: bool, error: str | None = None) -> None: ...
    def publish(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> str: ...
    def wait_for_servers(self, seconds: float, is_over: Callable[[], bool] = ...) -> None: ...
    def stats(self) -> list[ServerStats]: ...
    def close(self) -> None: ...


class RequestLoop:
    """Sends sub-requests and receives answers. A server that has work and is silent for ``silence_seconds`` has failed, and so
    has one that is never silent but takes longer than the longest wait in its queue and the slowest answer together.

    All answers of a server may be between two signs of life at once, so these are frequent enough for a server that generates
    only ``_SLOWEST`` tokens per second and answer.
    """

    def __init__(self, fleet: Fleet, dispatcher: Dispatcher, silence_seconds: float, keep_partial: bool = False) -> None:
        self._fleet, self._dispatcher, self._silence_seconds = fleet, dispatcher, silence_seconds
        self._keep_partial = keep_partial
        self._stream_interval = max(1, min(STREAM_INTERVAL, int(_SLOWEST * silence_seconds)))
        self._calls: dict[int, GenerateCall] = {}
        self._streams: dict[asyncio.Task[None], Stream] = {}
        self._queues: Counter[str] = Counter()  # answers in progress at each server
        self._heard: dict[str, float] = {}  # per server: its last sign of life, or when it got work after being idle
        self._sessions: dict[str, tuple[str, aiohttp.ClientSession]] = {}  # per server, with its URL
        self._closing: set[asyncio.Task[None]] = set()
        self._published: set[int] = set()
        self._loading: int | None = None
        self._no_load = asyncio.Event()
        self._no_load.set()
        self.meter = Meter(time.monotonic())

    # ---------------------------------------------------------------------------------------------------------- for callers

    def begin(self, call: GenerateCall) -> None:
        self._calls[call.number] = call
        self._add(call, call.requests.values())

    def add(self, call: GenerateCall, requests: Sequence[Request]) -> None:
        """Make further requests in a call, unless it has ended."""
        if call.number in self._calls:
            assert call.requests.keys().isdisjoint(request.request_id for request in requests), "two requests have the same id"
            call.requests.update({request.request_id: request for request in requests})
            self._add(call, requests)

    def forget(self, call: GenerateCall, request: int) -> None:
        """All answers to a request have arrived."""
        if (forgotten := call.requests.pop(request, None)) is not None:
            for index in range(len(forgotten.seeds)):
                call.partial.pop((request, index), None)
        call.refused.pop(request, None)

    def _add(self, call: GenerateCall, requests: Iterable[Request]) -> None:
        for request in requests:
            # vLLM refuses more than one greedy answer per request.
            together = call.sampling.temperature > 0
            runs = runs_of_seeds(request.seeds) if together else [range(i, i + 1) for i in range(len(request.seeds))]
            for indices in runs:
                self._dispatcher.add(
                    call.number,
                    request.request_id,
                    indices,
                    prompt_tokens=len(request.prompt_tokens),
                    hint=request.expected_tokens,
                    max_tokens=call.sampling.max_tokens,
                )
        self.send()

    def give_up(self, call: GenerateCall, request: int | None = None) -> None:
        """Abort the work in progress for a request, or for the whole call, and send other work instead."""
        tickets = set(self._dispatcher.give_up(call.number, request))
        for task, stream in self._streams.items():
            if stream.sub_request.ticket in tickets:
                task.cancel()
        self.send()

    def end(self, call: GenerateCall) -> None:
        """The caller wants no more answers."""
        self._calls.pop(call.number, None)
        self.give_up(call)
        while not call.answers.empty():
            item = call.answers.get_nowait()
            if not isinstance(item, Exception):
                self.waste(*item)

    def waste(self, completion: Completion, server: str) -> None:
        """Count an answer that nobody wants any more."""
        self.meter.tally(server).wasted_tokens += len(completion.tokens)

    def begin_load(self, version: int) -> None:
        self._loading = version
        self._no_load.clear()

    def end_load(self, version: int, succeeded: bool) -> None:
        if succeeded:
            self._published.add(version)
        self._loading = None
        self._no_load.set()
        now = time.monotonic()  # servers may be silent while they load weights
        self._heard = dict.fromkeys(self._heard, now)
        for stream in self._streams.values():
            stream.heard_at = stream.sent_at = now
        self.send()

    def is_stranded(self) -> bool:
        """Whether there is work but no server to give it to or to wait for."""
        return bool(self._dispatcher.num_waiting) and not self._streams and not self._fleet.serving()

    def take_usage(self) -> FleetUsage:
        return self.meter.take(time.monotonic(), [member.name for member in self._fleet.serving()])

    async def watch(self) -> None:
        """Send what can be sent and abort what has gone silent. Never returns."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                self.send()
                if self._loading is None:
                    self._abort_silent(time.monotonic())
            except Exception as error:
                self._fail(list(self._calls), error)

    async def close(self) -> None:
        self._fail(list(self._calls), EngineFault("the fleet's engine was closed"))
        for task in self._streams:  # a stream may still be open although all its answers have arrived
            task.cancel()
        if self._streams:
            await asyncio.wait(self._streams)
        await asyncio.gather(*(session.close() for _, session in self._sessions.values()), *self._closing)

    # ------------------------------------------------------------------------------------------------------------- sending

    def send(self) -> None:
        """Give servers as much work as they have room for."""
        if not self._dispatcher.num_waiting:
            return
        members = {member.name: member for member in self._fleet.serving()}
        held = {number for number, call in self._calls.items() if call.answers.qsize() > _MAX_UNREAD}
        for sub_request in self._dispatcher.assign(list(members), held):
            now, call = time.monotonic(), self._calls[sub_request.call]
            longest = _LONGEST_QUEUE * self._silence_seconds + call.rule.max_tokens / _SLOWEST  # in the queue, then answering
            stream = Stream(sub_request, members[sub_request.server], now, now, longest, set(sub_request.indices))
            if not self._queues[sub_request.server]:
                self._heard[sub_request.server] = now
            self._count(sub_request.server, len(sub_request.indices))
            if sub_request.num_faults:
                self.meter.tally(sub_request.server).num_retries += len(sub_request.indices)
            task = asyncio.get_running_loop().create_task(self._read(stream, call))
            self._streams[task] = stream
            task.add_done_callback(self._ended)  # not `finally`: a task cancelled before it starts never reaches one

    async def _read(self, stream: Stream, call: GenerateCall) -> None:
        """Read the answers to a sub-request until it ends or fails."""
        sub_request, member = stream.sub_request, stream.member
        request, tally = call.requests[sub_request.request], self.meter.tally
        indices = sub_request.indices
        seed, prompt, sampling = request.seeds[indices[0]], request.prompt_tokens, call.sampling
        if partial := call.partial.get((sub_request.request, indices[0])):
            seed, prompt = partial.seed(seed), np.concatenate([prompt, partial.tokens])
            sampling = replace(sampling, max_tokens=sampling.max_tokens - len(partial.tokens))
        body = make_body(prompt, seed, len(indices), sampling, self._stream_interval)
        try:
            session = self._session(member)
            events = generate(session, member.url, member.credentials, body, request, indices, call.rule, partial)
            async with contextlib.aclosing(events):
                async for event in events:
                    self._heard[member.name] = stream.heard_at = time.monotonic()
                    if isinstance(event, Progress):
                        stream.partial[event.index] += event.num_tokens
                        tally(member.name).tokens += event.num_tokens
                        if self._keep_partial:
                            stream.pieces[event.index].append((event.tokens, event.logprobs))
                        continue
                    await self._check_versions(event.versions, member)
                    completion = event.completion
                    if self._dispatcher.answered(sub_request.ticket, completion.index, len(completion.tokens)):
                        stream.left.remove(completion.index)
                        del stream.partial[completion.index]
                        stream.pieces.pop(completion.index, None)
                        tally(member.name).num_answers += 1
                        self._count(member.name, -1)
                        call.answers.put((completion, member.name))
                        self.send()
            self._fleet.report(member, True)
        except asyncio.CancelledError:
            if stream.fault:
                stream.is_cut = True
                self._failed(stream, stream.fault)
        except ServerFault as fault:
            stream.is_cut = fault.is_cut or fault.is_abort or fault.is_unavailable
            if fault.is_unavailable and self._loading is not None:
                await self._no_load.wait()  # paused for the new weights, not at fault; the answers then wait for a server again
            elif not fault.is_abort:
                self._failed(stream, str(fault))
        except Refused as refusal:
            self._refused(stream, call, str(refusal))
        except Exception as error:
            self._fail([call.number], error)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Return a sub-request's unfinished answers to the dispatcher."""
        stream = self._streams.pop(task)
        self._count(stream.member.name, -len(stream.left))
        call = self._calls.get(stream.sub_request.call)
        kept = self._keep(stream, call) if call is not None and self._keep_partial else {}
        self.meter.tally(stream.member.name).wasted_tokens += stream.partial.total() - sum(kept.values())
        lost = self._dispatcher.failed(stream.sub_request.ticket, kept)
        if call is not None and lost and stream.refusal:
            self._fail([call.number], EngineFault(f"server {stream.member.name} refuses a request: {stream.refusal}"))
        elif call is not None:
            for index in lost:
                call.answers.put((aborted(stream.sub_request.request, index, stream.member.weight_version), stream.member.name))
        self.send()

    def _keep(self, stream: Stream, call: GenerateCall) -> dict[int, int]:
        """Keep what has arrived of a sub-request's unfinished answers; return how many tokens its server added to each.

        What a server sent that then lied, or refused, is dropped, with what others had sent before.
        """
        kept: dict[int, int] = {}
        for index in sorted(stream.left):
            key, version = (stream.sub_request.request, index), stream.member.weight_version
            before = call.partial.pop(key, None) or PartialAnswer.nothing(version)
            partial = before.grown(stream.pieces[index], version)
            if stream.is_cut and call.rule.may_continue(partial.tokens, partial.logprobs):
                call.partial[key] = partial
                kept[index] = stream.partial[index]
            else:
                self.meter.tally(stream.member.name).wasted_tokens += len(before.tokens)
        return kept

    async def _check_versions(self, versions: Sequence[int], member: Member) -> None:
        """Raise ``ServerFault`` unless the ``versions`` of an answer's tokens are ones it may have."""
        if self._loading in versions:
            await self._no_load.wait()  # only then is it known whether that version counts
        if not versions or min(versions) < member.weight_version or not self._published.issuperset(versions):
            labels = ", ".join(map(str, versions)) or "unknown"
            raise ServerFault(f"answered with weights of version {labels}, unpublished or older than {member.weight_version}")

    # ------------------------------------------------------------------------------------------------------------ servers

    def _failed(self, stream: Stream, reason: str) -> None:
        member = stream.member
        log.warning("server %s %s; requesting %d answers again", member.name, reason, len(stream.left))
        self._fleet.report(member, False, reason)

    def _refused(self, stream: Stream, call: GenerateCall, reason: str) -> None:
        """One server may be wrong about a request: the call ends only if another one, or the last attempt, refuses it too."""
        name, stream.refusal = stream.member.name, reason
        first, why = call.refused.setdefault(stream.sub_request.request, (name, reason))
        self._failed(stream, f"refuses a request: {reason}")
        if first != name:
            self._fail([call.number], EngineFault(f"servers {first} and {name} refuse a request: {why}; {reason}"))

    def _fail(self, calls: Iterable[int], error: Exception) -> None:
        """End calls with an error."""
        for number in calls:
            if (call := self._calls.pop(number, None)) is not None:
                call.answers.put(error)
                self.give_up(call)

    def _abort_silent(self, now: float) -> None:
        for task, stream in self._streams.items():
            silence = max(now - self._heard[stream.member.name], (now - stream.heard_at) / _LONGEST_QUEUE)
            if silence > self._silence_seconds:
                stream.fault = f"sent nothing for {self._silence_seconds:g} s while it had work"
            elif now - stream.sent_at > stream.longest:
                stream.fault = f"did not finish a request within {stream.longest:g} s"
            else:
                continue
            task.cancel()

    def _count(self, server: str, change: int) -> None:
        self._queues[server] += change
        self.meter.queue(server, self._queues[server], time.monotonic())

    def _session(self, member: Member) -> aiohttp.ClientSession:
        url, session = self._sessions.get(member.name, ("", None))
        if session is None or url != member.url:
            if session is not None:  # of a server that was restarted
                task = asyncio.get_running_loop().create_task(session.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
            session = open_session()
            self._sessions[member.name] = (member.url, session)
        return session
