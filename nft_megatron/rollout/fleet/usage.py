"""What the servers did between two moments: tokens, waste, busy time. Pure: the caller passes the time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class ServerUsage:
    """One server's share. ``tokens``: all that it sent; ``wasted_tokens``: those that no caller received.

    Wasted are the tokens, sent so far, of answers that were aborted or cut off (a server sends every
    ``client.STREAM_INTERVAL`` tokens), and of answers that arrived when nobody wanted them any more. ``num_retries``: answers
    that had to be requested again. ``busy_seconds``: time with at least one answer to generate; ``mean_queue``: number of
    answers to generate, averaged over time.
    """

    tokens: int = 0
    num_answers: int = 0
    wasted_tokens: int = 0
    num_retries: int = 0
    busy_seconds: float = 0.0
    mean_queue: float = 0.0


@dataclass(frozen=True)
class FleetUsage:
    """``seconds`` between the two moments, and what each server did in that time.

    >>> servers = {"a": ServerUsage(tokens=100, busy_seconds=10.0), "b": ServerUsage(tokens=50, busy_seconds=5.0)}
    >>> usage = FleetUsage(10.0, servers)
    >>> usage.total.tokens, usage.idle_share, usage.idle_share_of("b")
    (150, 0.25, 0.5)
    """

    seconds: float
    servers: Mapping[str, ServerUsage]

    @property
    def total(self) -> ServerUsage:
        """The sum over all servers."""
        names = [entry.name for entry in fields(ServerUsage)]
        return ServerUsage(**{name: sum(getattr(server, name) for server in self.servers.values()) for name in names})

    @property
    def idle_share(self) -> float:
        """The share of the servers' time in which they had nothing to do. 0 without servers."""
        return _idle(self.total.busy_seconds, self.seconds * len(self.servers))

    def idle_share_of(self, server: str) -> float:
        return _idle(self.servers[server].busy_seconds, self.seconds)


def _idle(busy: float, seconds: float) -> float:
    return max(0.0, 1 - busy / seconds) if seconds > 0 else 0.0


@dataclass
class _Tally:
    tokens: int = 0
    num_answers: int = 0
    wasted_tokens: int = 0
    num_retries: int = 0
    busy_seconds: float = 0.0
    answer_seconds: float = 0.0


class Meter:
    """Adds up what happens. ``now``: seconds of any monotonic clock.

    >>> meter = Meter(now=0.0)
    >>> meter.queue("a", 4, now=2.0)
    >>> meter.queue("a", 0, now=6.0)
    >>> usage = meter.take(now=8.0).servers["a"]
    >>> usage.busy_seconds, usage.mean_queue
    (4.0, 2.0)
    """

    def __init__(self, now: float) -> None:
        self._since = now
        self._tallies: dict[str, _Tally] = {}
        self._queues: dict[str, tuple[int, float]] = {}  # per server: answers, since when

    def tally(self, server: str) -> _Tally:
        """The counters of a server, for the caller to increase."""
        return self._tallies.setdefault(server, _Tally())

    def queue(self, server: str, num_answers: int, now: float) -> None:
        """From ``now`` on, the server has ``num_answers`` answers to generate."""
        before, since = self._queues.get(server, (0, now))
        tally = self.tally(server)
        tally.busy_seconds += (now - since) * (before > 0)
        tally.answer_seconds += (now - since) * before
        self._queues[server] = (num_answers, now)

    def take(self, now: float, idle: Iterable[str] = ()) -> FleetUsage:
        """What happened since the last call. ``idle``: servers to include even if they had no work."""
        for server, (num_answers, _) in list(self._queues.items()):
            self.queue(server, num_answers, now)
        seconds = now - self._since
        usages = {}
        for server in sorted({*self._tallies, *idle}):
            counts = vars(self.tally(server)).copy()
            answer_seconds = counts.pop("answer_seconds")
            usages[server] = ServerUsage(**counts, mean_queue=answer_seconds / seconds if seconds > 0 else 0.0)
        self._since = now
        self._tallies = {}
        self._queues = {server: queue for server, queue in self._queues.items() if queue[0]}
        return FleetUsage(seconds, usages)
