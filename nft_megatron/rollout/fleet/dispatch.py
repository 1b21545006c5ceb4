"""Which server answers what: pure bookkeeping, without clock, threads or sockets, so that it can be simulated.

A *sub-request* is a run of answers to one request, consecutive by index, that one server generates together: they share the
prompt's prefill and one HTTP request. The rules:

1. Answers cut off by a fault go first, then those expected to be longest, since whatever starts last decides when all is done.
2. A sub-request goes to the server with the fewest outstanding tokens, if that fits its budget or it is idle.
3. A sub-request holds at most an equal share of all waiting answers, so that the last ones spread over all servers.
4. What one server fails to answer goes to another, if there is one, and is lost after ``max_attempts``.

At any time every answer is either waiting, in exactly one sub-request, or settled (answered, lost or given up), and nothing
leaves *settled*. So no answer is forgotten or counted twice, whatever a slow server may still send.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

# Expected length of an answer without a hint, as a share of the longest allowed: its initial value, and how far each answer
# moves it. It moves slowly because short answers finish first.
_FIRST_SHARE, _SHARE_RATE = 0.25, 1e-3


@dataclass(frozen=True)
class SubRequest:
    """Answers ``indices`` (consecutive) of request ``request`` in call ``call``, for ``server`` to generate.

    ``ticket`` is unique: an answer counts only under the ticket of its current sub-request. ``num_faults``: how many earlier
    attempts at these answers failed.
    """

    ticket: int
    server: str
    call: int
    request: int
    indices: range
    num_faults: int = 0


@dataclass(frozen=True)
class _Work:
    """Consecutive answers of one request that wait together, and what is known of their cost."""

    call: int
    request: int
    indices: range
    prompt_tokens: int
    hint: int | None
    max_tokens: int
    num_faults: int = 0
    failed_on: frozenset[str] = frozenset()


@dataclass
class _Sent:
    """A sub-request in progress, with the tokens reserved for it, so that exactly those are released."""

    work: _Work
    server: str
    answer_tokens: int
    open: set[int]


class Dispatcher:
    """Waiting work, sub-requests in progress, and outstanding tokens per server.

    ``budget_tokens``: most outstanding tokens per server, counting prompts and expected answers; an idle server always gets one
    sub-request. ``max_attempts``: how often an answer is requested before it is lost.

    >>> dispatcher = Dispatcher(budget_tokens=1000, max_attempts=2)
    >>> dispatcher.add(0, 7, range(4), prompt_tokens=10, hint=100, max_tokens=200)
    >>> [(sub.ticket, sub.server, sub.indices) for sub in dispatcher.assign(["a", "b"])]
    [(0, 'a', range(0, 2)), (1, 'b', range(2, 4))]
    >>> dispatcher.outstanding("a")
    210
    >>> dispatcher.answered(0, 0, num_tokens=90), dispatcher.answered(0, 0, num_tokens=90)
    (True, False)
    >>> dispatcher.failed(0)  # answer 1 is unfinished and waits again
    []
    >>> [(sub.ticket, sub.server, sub.indices) for sub in dispatcher.assign(["a", "b"])]
    [(2, 'b', range(1, 2))]
    """

    def __init__(self, *, budget_tokens: int, max_attempts: int) -> None:
        self._budget_tokens, self._max_attempts = budget_tokens, max_attempts
        self._tickets, self._order = itertools.count(), itertools.count()
        self._waiting: dict[int, list[tuple[int, int, int, _Work]]] = {}  # per call a heap, next work on top
        self._num_waiting = 0
        self._sent: dict[int, _Sent] = {}
        self._outstanding: defaultdict[str, int] = defaultdict(int)
        self._share = _FIRST_SHARE

    def add(self, call: int, request: int, indices: range, *, prompt_tokens: int, hint: int | None, max_tokens: int) -> None:
        """Request the answers ``indices`` (consecutive) of a request.

        ``hint``: expected tokens of one answer. If None, a quarter of ``max_tokens`` at first, then gradually the share of it
        that answers turn out to use.
        """
        self._wait(_Work(call, request, indices, prompt_tokens, hint, max_tokens))

    def assign(self, servers: Sequence[str], held: Container[int] = frozenset()) -> list[SubRequest]:
        """The sub-requests to send now, each to one of ``servers``. Calls in ``held`` get none."""
        sub_requests: list[SubRequest] = []
        if not servers:
            return sub_requests
        share = -(-self._num_waiting // len(servers))
        held_back: list[_Work] = []  # for servers that have not failed at it but are full
        while heaps := [heap for call, heap in self._waiting.items() if call not in held]:
            heap = min(heaps, key=lambda heap: heap[0][:3])
            work = heap[0][-1]
            indices, rest = work.indices[:share], work.indices[share:]
            answer_tokens = self._expected(work)
            num_tokens = work.prompt_tokens + len(indices) * answer_tokens
            server = self._choose(servers, work, num_tokens)
            if server is None:
                if work.failed_on.isdisjoint(servers) or not any(self._has_room(name, num_tokens) for name in servers):
                    break
                held_back.append(self._pop(work.call))
                continue
            self._pop(work.call)
            if rest:
                self._wait(replace(work, indices=rest))
            sent = _Sent(work, server, answer_tokens, set(indices))
            ticket = next(self._tickets)
            self._sent[ticket] = sent
            self._outstanding[server] += num_tokens
            sub_requests.append(SubRequest(ticket, server, work.call, work.request, indices, work.num_faults))
        for work in held_back:
            self._wait(work)
        return sub_requests

    def answered(self, ticket: int, index: int, num_tokens: int) -> bool:
        """Settle an answer of ``num_tokens``. False if it no longer belongs to this sub-request: it then does not count."""
        sent = self._sent.get(ticket)
        if sent is None or index not in sent.open:
            return False
        self._share += (num_tokens / sent.work.max_tokens - self._share) * _SHARE_RATE
        sent.open.remove(index)
        self._outstanding[sent.server] -= sent.answer_tokens
        if not sent.open:
            self._end(ticket)
        return True

    def failed(self, ticket: int, kept: Mapping[int, int] = MappingProxyType({})) -> list[int]:
        """End a sub-request that its server did not finish. The rest waits again or is lost; return the lost indices.

        ``kept``: how many tokens remain of an answer; it continues, alone, with these as further tokens of its prompt.
        """
        if ticket not in self._sent:
            return []
        sent = self._end(ticket)
        work = replace(sent.work, num_faults=sent.work.num_faults + 1, failed_on=sent.work.failed_on | {sent.server})
        if work.num_faults == self._max_attempts:
            return sorted(sent.open)
        for indices in neighbours(sent.open - kept.keys()):
            self._wait(replace(work, indices=indices))
        for index, num_tokens in kept.items():
            hint = None if work.hint is None else max(work.hint - num_tokens, 1)
            tokens = work.prompt_tokens + num_tokens
            self._wait(replace(work, indices=range(index, index + 1), prompt_tokens=tokens, hint=hint))
        return []

    def give_up(self, call: int, request: int | None = None) -> list[int]:
        """Settle all answers of a request, or of a whole call; return the tickets of the sub-requests to abort."""

        def concerned(work: _Work) -> bool:
            return work.call == call and request in (None, work.request)

        kept = []
        for entry in self._waiting.pop(call, []):
            if concerned(entry[-1]):
                self._num_waiting -= len(entry[-1].indices)
            else:
                kept.append(entry)
        if kept:
            heapq.heapify(kept)
            self._waiting[call] = kept
        tickets = [ticket for ticket, sent in self._sent.items() if concerned(sent.work)]
        for ticket in tickets:
            self._end(ticket)
        return tickets

    @property
    def num_waiting(self) -> int:
        """The number of answers not yet assigned to a server."""
        return self._num_waiting

    def outstanding(self, server: str) -> int:
        """Expected tokens assigned to ``server`` and not yet answered."""
        return self._outstanding[server]

    def _expected(self, work: _Work) -> int:
        return min(work.hint, work.max_tokens) if work.hint is not None else math.ceil(self._share * work.max_tokens)

    def _choose(self, servers: Sequence[str], work: _Work, num_tokens: int) -> str | None:
        untried = [server for server in servers if server not in work.failed_on]
        server = min(untried or servers, key=self.outstanding)
        return server if self._has_room(server, num_tokens) else None

    def _has_room(self, server: str, num_tokens: int) -> bool:
        return self._outstanding[server] == 0 or self._outstanding[server] + num_tokens <= self._budget_tokens

    def _wait(self, work: _Work) -> None:
        entry = (-work.num_faults, -self._expected(work), next(self._order), work)
        heapq.heappush(self._waiting.setdefault(work.call, []), entry)
        self._num_waiting += len(work.indices)

    def _pop(self, call: int) -> _Work:
        work = heapq.heappop(self._waiting[call])[-1]
        self._num_waiting -= len(work.indices)
        if not self._waiting[call]:
            del self._waiting[call]
        return work

    def _end(self, ticket: int) -> _Sent:
        sent = self._sent.pop(ticket)
        self._outstanding[sent.server] -= sent.work.prompt_tokens + len(sent.open) * sent.answer_tokens
        return sent


def neighbours(indices: Collection[int]) -> list[range]:
    """``indices`` as runs without gaps, in order.

    >>> neighbours({5, 1, 2})
    [range(1, 3), range(5, 6)]
    """
    runs: list[range] = []
    for index in sorted(indices):
        if runs and runs[-1].stop == index:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    return runs
