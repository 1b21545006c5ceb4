"""Keeps one server running: a thread that starts it, checks it, gives it the current weights, and restarts it.

Only this thread changes the server; other threads read its health and report what they saw, under one lock. Every action of the
thread has a deadline, so a hung server delays only itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from nft_megatron.base.backoff import Backoff
from nft_megatron.base.deadline import Deadline
from nft_megatron.rollout.fleet.control import Control, ControlError, InFlight
from nft_megatron.rollout.fleet.health import Health, State
from nft_megatron.rollout.fleet.member import Member
from nft_megatron.rollout.fleet.refresh import WrongWeights, compare_canaries, load_folder, verify_and_resume
from nft_megatron.rollout.fleet.server import Server
from nft_megatron.rollout.fleet.versions import Published

log = logging.getLogger(__name__)

_CHECK_SECONDS = 1.0
_STOP_SECONDS = 5.0


@dataclass(frozen=True)
class Deadlines:
    """Seconds for a start, for loading weights, and for a health check."""

    start: float
    sync: float
    silence: float


@dataclass(frozen=True)
class ServerStats:
    """One server in the metrics. ``sync_*``: of its last weight update; ``num_restarts``: since the fleet started."""

    name: str
    state: str
    version: int
    num_restarts: int
    sync_seconds: float
    sync_bytes: int
    reason: str


@dataclass
class Target:
    """The weights that all servers must hold; a fleet's supervisors share it under the lock ``changed``.

    ``canary`` is the first one of the current version; the others must agree with it.
    """

    changed: threading.Condition = field(default_factory=lambda: threading.Condition(threading.RLock()))
    published: Published | None = None
    canary: list[float] | None = None
    closed: bool = False


class ServerSupervisor:
    """Supervises one server. ``launch`` starts it; None: it runs at ``url``, as the start ``server_id`` if it is the run's own.

    ``claim`` is held while its weights are being changed, by this thread or by a broadcast.
    """

    def __init__(
        self,
        name: str,
        target: Target,
        deadlines: Deadlines,
        in_flight: InFlight,
        vocab_size: int,
        api_key: str,
        url: str = "",
        launch: Callable[[], Server] | None = None,
        server_id: str | None = None,
    ) -> None:
        self.name, self.api_key, self.url, self.server_id = name, api_key, url, server_id
        self.claim = threading.Lock()
        self.reading: int | None = None  # the version whose files it is reading
        self._target, self._deadlines, self._in_flight, self._vocab_size = target, deadlines, in_flight, vocab_size
        self._launch = launch
        self._server: Server | None = None
        self._start = Deadline.of(deadlines.start)
        self._health, self._incarnation = Health(), 0
        self._vouched = False  # whether this process's model was compared with what arrived
        self._backoff, self._next_attempt = Backoff(), Deadline.of(0.0)
        self._sync_seconds, self._sync_bytes = 0.0, 0
        self._left = False
        self._thread = threading.Thread(target=self._keep, name=f"fleet-{name}", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------------- for other threads

    def member(self) -> Member:
        """A snapshot for the rest of the program."""
        with self._target.changed:
            version = self._health.version
            return Member(
                self.name,
                self.url,
                self.api_key,
                self._health,
                -1 if version is None else version,
                self._incarnation,
                self.server_id,
            )

    def stats(self) -> ServerStats:
        with self._target.changed:
            version = self._health.version
            return ServerStats(
                self.name,
                self._health.state.value,
                -1 if version is None else version,
                max(0, self._incarnation - 1),
                self._sync_seconds,
                self._sync_bytes,
                self._health.reason,
            )

    def serves(self) -> bool:
        """Whether it may get work now."""
        with self._target.changed:
            published = self._target.published
            return published is not None and self._health.serves(published.version)

    def is_reachable(self) -> bool:
        """Whether it answered the last check."""
        with self._target.changed:
            return self._health.state in (State.HEALTHY, State.STALE)

    def report(self, incarnation: int, ok: bool, error: str | None) -> None:
        """A client's request ended. Reports about an earlier process of this server are ignored."""
        with self._target.changed:
            if incarnation != self._incarnation or self._health.state not in (State.HEALTHY, State.SUSPECT):
                return
            self._become(self._health.worked() if ok else self._health.doubted(error or "a request failed"))

    def is_behind(self, version: int, fingerprint: str) -> None:
        """``version`` was published; the server gets no more work until it holds it."""
        self._event(lambda health: health.weights_behind(version, fingerprint))

    def moved(self, url: str, server_id: str) -> None:
        """Another process now serves under this name, unless both are those of the one known."""
        with self._target.changed:
            if (url, server_id) != (self.url, self.server_id):
                self.url, self.server_id = url, server_id
                self._incarnation += 1
                self._vouched = False
                self._become(self._health.started())

    def leave(self) -> None:
        """It has left the fleet."""
        with self._target.changed:
            self._left = True
            self._become(self._health.exited("left the fleet"))

    def close(self, seconds: float) -> None:
        """End the thread, and the server if it was started here."""
        with self._target.changed:
            self._left = True
            self._target.changed.notify_all()
        server = self._server
        if server is not None:
            server.stop(min(seconds, _STOP_SECONDS))  # calls in progress fail at once
        self._thread.join(seconds)

    def control(self) -> Control:
        with self._target.changed:
            return Control(self.url, self.api_key, self._deadlines.silence, self.server_id)

    # ------------------------------------------------------------------------------------------------------- its thread

    def _keep(self) -> None:
        while not self._is_over():
            try:
                self._attend()
            except Exception:  # if the supervisor ended, its server would be left unattended without notice
                log.exception("fleet: supervisor of %s", self.name)
                self._event(lambda health: health.failed("the supervisor failed; see the log"))
            self._rest()
        if self._server is not None:
            self._server.stop(0)

    def _is_over(self) -> bool:
        with self._target.changed:
            return self._left or self._target.closed

    def _rest(self) -> None:
        """Wait until the next check or until there is something to do."""
        with self._target.changed:
            self._target.changed.wait_for(lambda: self._is_over() or self._wants_refresh(), _CHECK_SECONDS)

    def _wants_refresh(self) -> bool:
        return self._health.state is State.STALE and self._source() is not None and self._next_attempt.has_passed

    def _source(self) -> Published | None:
        """What it can load on its own: a version with files."""
        published = self._target.published
        return published if published is not None and published.folder is not None else None

    def _attend(self) -> None:
        """One round: make sure that it runs and answers, and update its weights."""
        if self._launch is not None and not self._is_running():
            return
        if self.claim.acquire(timeout=_CHECK_SECONDS):  # else a broadcast has it, which has its own deadlines
            try:
                self._check()
                with self._target.changed:
                    source = self._source() if self._wants_refresh() else None
                if source is not None:
                    self.refresh(lambda control, deadline: load_folder(control, source, self._in_flight, deadline), source)
            finally:
                self.claim.release()

    def _is_running(self) -> bool:
        """Start or restart it if necessary; False while a restart must still wait."""
        assert self._launch is not None
        if self._server is not None and not self._server.is_alive():
            self._event(lambda health: health.exited("its processes exited"))
        if self._server is None or self._health.state is State.DEAD:
            if self._server is not None:
                text = "fleet: %s is dead (%s); restarting it; last lines of %s:\n%s"
                log.warning(text, self.name, self._health.reason, self._server.log, self._server.log_tail())
                self._server.stop(0)
                self._server = None
                self._next_attempt = Deadline.of(self._backoff.next_delay())
            if not self._next_attempt.has_passed or self._is_over():
                return False
            server = self._launch()
            with self._target.changed:
                self._server, self.url, self.server_id = server, server.url, server.server_id
                self._incarnation += 1
                self._start, self._vouched = Deadline.of(self._deadlines.start), False
                self._become(self._health.started())
        return True

    def _check(self) -> None:
        """Ask for its version, which shows that its API and its engine both answer and that it is the process we know."""
        try:
            version = self.control().version()
        except ControlError as error:
            if self._health.state is State.STARTING and self._launch and self._start.has_passed:
                self._event(lambda health: health.exited(f"not up after {self._deadlines.start:g} s"))
            text = str(error)
            self._event(lambda health: health.failed(text))
            return
        self._event(lambda health: health.answered(version))

    def refresh(self, load: Callable[[Control, Deadline], None], published: Published, started: float | None = None) -> bool:
        """Give the server ``published`` by ``load``; let it serve if it proves that it holds it. The caller holds ``claim``.

        ``started``: when this began, if before now.
        """
        control, deadline = self.control(), Deadline.of(self._deadlines.sync)
        started = time.monotonic() if started is None else started
        incarnation, self.reading = self._incarnation, published.version
        try:
            load(control, deadline)
            canary = verify_and_resume(control, published, self._vocab_size, not self._vouched, deadline)
            self._agree(published, canary)
        except (ControlError, WrongWeights) as error:
            log.warning("fleet: %s did not load version %d: %s", self.name, published.version, error)
            text = str(error)
            self._event(lambda health: health.weights_refused(text))
            self._next_attempt = Deadline.of(self._backoff.next_delay())
            return False
        finally:
            self.reading = None
        with self._target.changed:
            if incarnation != self._incarnation:
                return False
            self._vouched = True
            self._backoff.reset()
            self._sync_seconds, self._sync_bytes = time.monotonic() - started, published.num_bytes
            current = self._target.published
            health = self._health.weights_loaded(published.version, published.fingerprint)
            self._become(health.weights_behind(current.version, current.fingerprint) if current is not None else health)
        return True

    def _agree(self, published: Published, canary: list[float]) -> None:
        """Compare the canary with the first one of this version."""
        with self._target.changed:
            if self._target.published is not published:
                return
            if self._target.canary is None:
                self._target.canary = canary
            expected = self._target.canary
        compare_canaries(self.url, canary, expected)

    def _event(self, change: Callable[[Health], Health]) -> None:
        with self._target.changed:
            self._become(change(self._health))

    def _become(self, health: Health) -> None:
        """Set the new health and wake whoever waits for it. The caller holds the lock."""
        if health.state is not self._health.state:
            log.info("fleet: %s is %s%s", self.name, health.state.value, f" ({health.reason})" if health.reason else "")
        if health != self._health:
            self._health = health
            self._target.changed.notify_all()
