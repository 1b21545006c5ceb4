"""The health of a server as a pure state machine: events in, a new ``Health`` out.

    STARTING --answered--> STALE --weights_loaded--> HEALTHY <------- answered ------- SUSPECT
        ^                    ^                          | --failed, silent, doubted-->    |
        |                    +------ weights_behind ----+---------------------------------+
        +------ started ---- DEAD <--- exited, or too many failures, from anywhere

A server gets work only while HEALTHY and on the current version. Only a weight refresh leads from DEAD to HEALTHY: a restarted
process has its *first* weights, and one that was merely unreachable may have missed an update.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace


class State(enum.Enum):
    """STARTING: has not answered yet. STALE: answers, but lacks the current weights. HEALTHY: may serve.

    SUSPECT: failed recently; gets no new work until it answers again. DEAD: gone, or written off.
    """

    STARTING = "starting"
    STALE = "stale"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DEAD = "dead"


@dataclass(frozen=True)
class Health:
    """One server's state, the version and fingerprint of its weights, and its consecutive failures.

    ``num_failures`` counts failed health checks since the last one that it answered, ``num_refusals`` failed weight loads, and
    ``num_doubts`` requests that failed although checks succeeded. Too many of one kind in a row make it DEAD; it is then
    restarted.

    >>> health = Health().answered(None).weights_loaded(3, "5a")
    >>> health.state, health.serves(3), health.serves(4)
    (<State.HEALTHY: 'healthy'>, True, False)
    >>> health.failed("connection reset").state
    <State.SUSPECT: 'suspect'>
    >>> health.exited("signal 9").answered(3).state
    <State.STALE: 'stale'>
    """

    state: State = State.STARTING
    version: int | None = None
    fingerprint: str | None = None
    num_failures: int = 0
    num_refusals: int = 0
    num_doubts: int = 0
    reason: str = ""
    max_failures: int = 3
    max_refusals: int = 2
    max_doubts: int = 5

    def serves(self, version: int) -> bool:
        """Whether it may get work for the weights ``version``."""
        return self.state is State.HEALTHY and self.version == version

    def started(self) -> Health:
        """A new process is starting; what the old one held is gone."""
        return Health(max_failures=self.max_failures, max_refusals=self.max_refusals, max_doubts=self.max_doubts)

    def answered(self, version: int | None) -> Health:
        """It answered a health check and reports the weights ``version`` (None: not ours).

        A version other than the one it was given shows that it was restarted behind our back.
        """
        if self.state in (State.STARTING, State.DEAD) or (self.state is not State.STALE and version != self.version):
            return replace(
                self, state=State.STALE, version=None, fingerprint=None, num_failures=0, num_refusals=0, num_doubts=0
            )
        if self.state is State.SUSPECT:
            return replace(self, state=State.HEALTHY, num_failures=0, reason="")
        return replace(self, num_failures=0)

    def failed(self, reason: str) -> Health:
        """A health check failed. While it is starting, that is expected, but says why nobody sees it serve."""
        if self.state is State.STARTING:
            return replace(self, reason=reason)
        if self.state is State.DEAD:
            return self
        num_failures = self.num_failures + 1
        if num_failures >= self.max_failures:
            return self.exited(reason)
        state = State.SUSPECT if self.state is State.HEALTHY else self.state
        return replace(self, state=state, num_failures=num_failures, reason=reason)

    def silent(self, seconds: float) -> Health:
        """It did not answer within ``seconds``."""
        return self.failed(f"no answer within {seconds:g} s")

    def doubted(self, reason: str) -> Health:
        """A client's request failed. One cause may fail many at once: only the first counts until a check succeeds again."""
        if self.state is not State.HEALTHY:
            return self
        num_doubts = self.num_doubts + 1
        if num_doubts >= self.max_doubts:
            return self.exited(reason)
        return replace(self, state=State.SUSPECT, num_doubts=num_doubts, reason=reason)

    def worked(self) -> Health:
        """A client's request succeeded."""
        return replace(self, num_doubts=0)

    def exited(self, reason: str) -> Health:
        """Its process is gone, it took too long to start, or it left the fleet."""
        return replace(self, state=State.DEAD, version=None, fingerprint=None, reason=reason)

    def weights_loaded(self, version: int, fingerprint: str) -> Health:
        """It proved that it holds ``version``. A dead or starting server must first answer a check."""
        if self.state in (State.STARTING, State.DEAD):
            return self
        return replace(
            self, state=State.HEALTHY, version=version, fingerprint=fingerprint, num_failures=0, num_refusals=0, reason=""
        )

    def weights_refused(self, reason: str) -> Health:
        """A load failed or left the wrong fingerprint: whatever it holds now is not a published version."""
        if self.state in (State.STARTING, State.DEAD):
            return self
        num_refusals = self.num_refusals + 1
        if num_refusals >= self.max_refusals:
            return self.exited(reason)
        return replace(self, state=State.STALE, version=None, fingerprint=None, num_refusals=num_refusals, reason=reason)

    def weights_behind(self, version: int, fingerprint: str) -> Health:
        """``version`` was published, perhaps again with other weights, and this server does not hold it yet."""
        if self.state in (State.HEALTHY, State.SUSPECT) and (self.version, self.fingerprint) != (version, fingerprint):
            return replace(self, state=State.STALE)
        return self
