"""The fleet as a whole: which servers there are, which weights they should hold, and how the weights reach them.

Each server has its own thread (``supervisor.py``); what concerns all of them is here. Once a version is published, no server
serves until it has proved that it holds that version, whether it was there at the time, joined later or was restarted.
"""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nft_megatron.base.atomic_io import remove_leftovers
from nft_megatron.base.deadline import Deadline
from nft_megatron.base.errors import StoppedEarly, UserError
from nft_megatron.config.fleet import FleetConfig
from nft_megatron.rollout.fleet import transfer
from nft_megatron.rollout.fleet.health import State
from nft_megatron.rollout.fleet.member import Member
from nft_megatron.rollout.fleet.notice import WaitNotice
from nft_megatron.rollout.fleet.registry import Registration, discover, read_key, run_key
from nft_megatron.rollout.fleet.server import Server, ServerSettings
from nft_megatron.rollout.fleet.supervisor import Deadlines, ServerStats, ServerSupervisor, Target
from nft_megatron.rollout.fleet.versions import CheckedStream, Published, VersionWriter, remove_versions
from nft_megatron.weights import read_shape, weight_table

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_DISCOVER_SECONDS = 1.0
_LOOK_SECONDS = 0.5
_CLOSE_SECONDS = 10.0
_MAX_SHARD_BYTES = 1 << 30
_NUM_KEPT = 2
_THERE = (State.STALE.value, State.HEALTHY.value)
_MAX_TOLD = 100  # files that are no registrations


class Fleet:
    """Servers and their weights. Call ``start`` first and ``close`` last; any thread may call any method.

    ``settings`` says how to start servers, and ``settings.folder`` is where they register; ``seed`` is the run's.
    ``interrupted`` gives a reason to end every wait for servers, or None.
    """

    def __init__(
        self,
        config: FleetConfig,
        settings: ServerSettings,
        weights_dir: Path,
        seed: int = 0,
        interrupted: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._config, self._settings, self._weights_dir, self._seed = config, settings, weights_dir, seed
        self._interrupted = interrupted
        shape = read_shape(settings.model_folder)
        self._vocab_size, self._shapes = shape.vocab_size, weight_table(shape).shapes
        self._deadlines = Deadlines(config.start_seconds, config.sync_seconds, config.silence_seconds)
        self._target = Target()
        self._supervisors: dict[str, ServerSupervisor] = {}
        self._registered: dict[str, Registration] = {}
        self._told: set[str] = set()
        self._publishing = threading.Lock()
        self._has_served = False
        self._watcher = threading.Thread(target=self._watch, name="fleet-discovery", daemon=True)

    def start(self) -> None:
        """Start ``fleet.servers`` servers, add those at ``fleet.urls``, and start looking for others. Returns at once.

        Raises ``UserError`` if ``fleet.devices`` does not match the servers, or the key file is missing or empty.
        """
        config = self._config
        if config.devices and len(config.devices) != config.servers:
            raise UserError(
                "fleet.devices",
                config.devices,
                f"lists GPUs for {len(config.devices)} servers, not for fleet.servers = {config.servers}",
                "list the GPUs of every server, or leave it empty",
            )
        self._settings.folder.mkdir(parents=True, exist_ok=True)
        remove_versions(self._weights_dir, keep=set())  # left by an earlier process of this run
        remove_leftovers(self._weights_dir)
        for index in range(config.servers):
            self._add(f"local-{index}", self._settings.api_key, launch=self._launcher(index))
        key = read_key(config.key_file) if config.key_file is not None else self._settings.api_key
        for index, url in enumerate(config.urls):
            self._add(f"url-{index}", key, url=url.rstrip("/"))
        self._watcher.start()

    def serving(self) -> list[Member]:
        """The servers that may get work: healthy and on the latest published version."""
        with self._target.changed:
            return [supervisor.member() for supervisor in self._supervisors.values() if supervisor.serves()]

    def report(self, member: Member, ok: bool, error: str | None = None) -> None:
        """Report how a request to ``member`` ended; ``error`` says what went wrong with the server."""
        with self._target.changed:
            supervisor = self._supervisors.get(member.name)
        if supervisor is not None:
            supervisor.report(member.incarnation, ok, error)

    def publish(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        """Publish the stream to all servers as ``version``, and return its fingerprint.

        Waits for: ``fleet.min_servers`` servers to prove that they hold it; the others follow on their own. Unblocks: requests
        to them, whose answers carry ``version``.

        Raises ``UserError`` for a missing, unexpected or repeated name or a wrong shape (then no server holds it, and those
        that started loading it are paused), ``StoppedEarly`` if too few servers hold it after ``fleet.wait_seconds``.
        """
        with self._publishing:
            stream = CheckedStream(tensors, self._shapes)
            if self._config.weights == "folder":
                folder = self._writer(version).write(stream)
                self._set(Published(version, stream.fingerprint, stream.num_bytes, folder))
            else:
                self._transfer(stream, version)
            self._remove_old(version)
        self.wait_for_servers(self._config.wait_seconds)
        return stream.fingerprint

    def wait_for_servers(self, seconds: float, is_over: Callable[[], bool] = lambda: False) -> None:
        """Return once ``fleet.min_servers`` servers are serving, or ``is_over`` returns True. Logs what it waits for.

        Raises ``StoppedEarly`` (exit code 75) after ``seconds``, or once the run is interrupted, unless enough servers are
        there and only load their weights.
        """
        deadline, notice = Deadline.of(seconds), WaitNotice(self._has_served)
        while not is_over():  # called without the lock, as is what follows: they may access files
            reason = self._interrupted()
            with self._target.changed:
                stats = self.stats()
                num_serving = len(self.serving())
                if num_serving >= self._config.min_servers:
                    self._has_served = True
                    return
                serving = f"{num_serving} of fleet.min_servers = {self._config.min_servers} servers are serving"
                if deadline.has_passed or self._target.closed:
                    text = "; ".join(f"{each.name} {each.state} ({each.reason or 'no fault'})" for each in stats)
                    raise StoppedEarly(
                        f"{serving} after {seconds:g} s: {text or 'there are none'}. See {self._settings.log_folder}"
                    )
                if reason and sum(each.state in _THERE for each in stats) < self._config.min_servers:
                    raise StoppedEarly(f"stopped by {reason} while waiting for servers ({serving}); the same command resumes")
                notice.look(serving, stats, deadline.left, self._settings.folder)
                self._target.changed.wait(min(deadline.left, _LOOK_SECONDS))

    def stats(self) -> list[ServerStats]:
        """Statistics of every known server."""
        return [supervisor.stats() for supervisor in self._all()]

    def close(self) -> None:
        """Stop the servers started here and all threads; leave other servers as they are."""
        with self._target.changed:
            self._target.closed = True
            self._target.changed.notify_all()
        _all_at_once([partial(supervisor.close, _CLOSE_SECONDS) for supervisor in self._all()])
        if self._watcher.is_alive():
            self._watcher.join(_CLOSE_SECONDS)
        remove_versions(self._weights_dir, keep=set())

    # --------------------------------------------------------------------------------------------------------- servers

    def _all(self) -> list[ServerSupervisor]:
        with self._target.changed:
            return list(self._supervisors.values())

    def _add(
        self,
        name: str,
        api_key: str,
        url: str = "",
        launch: Callable[[], Server] | None = None,
        server_id: str | None = None,
    ) -> None:
        supervisor = ServerSupervisor(
            name, self._target, self._deadlines, self._config.in_flight, self._vocab_size, api_key, url, launch, server_id
        )
        with self._target.changed:
            self._supervisors[name] = supervisor

    def _launcher(self, index: int) -> Callable[[], Server]:
        devices = self._config.devices[index] if self._config.devices else None
        return lambda: Server(self._settings, f"local-{index}", seed=server_seed(self._seed, f"local-{index}"), devices=devices)

    def _watch(self) -> None:
        """Look for servers that register, move or leave."""
        told: set[tuple[type, int | None]] = set()  # of failures in a row; files that are no registrations are told once
        while True:
            try:
                self._look()
                told.clear()
            except Exception as error:  # a disk may be away for a while: what was known still holds
                kind = type(error), getattr(error, "errno", None)
                if kind not in told:
                    log.warning("fleet: could not look for servers; trying again: %s", error, exc_info=True)
                told.add(kind)
            with self._target.changed:
                if self._target.changed.wait_for(lambda: self._target.closed, _DISCOVER_SECONDS):
                    return

    def _look(self) -> None:
        """Look once. Raises ``OSError`` or ``UserError`` if folder or key cannot be read; the rest follows next time."""
        found = discover(self._settings.folder, self._registered, self._tell_once)
        for name in self._registered.keys() - found.keys():
            del self._registered[name]
            with self._target.changed:
                supervisor = self._supervisors.pop(name)
            log.info("fleet: %s left", name)
            supervisor.leave()
        for name, registration in found.items():
            if name in self._registered:
                self._supervisors[name].moved(registration.url, registration.server_id)
            else:
                key = run_key(self._settings.folder)
                self._add(name, key, url=registration.url, server_id=registration.server_id)
                log.info("fleet: %s joined at %s", name, registration.url)
            self._registered[name] = registration

    def _tell_once(self, text: str) -> None:
        if text not in self._told and len(self._told) < _MAX_TOLD:
            log.warning("fleet: %s", text)
            self._told.add(text)

    # --------------------------------------------------------------------------------------------------------- weights

    def _set(self, published: Published) -> None:
        """Make this the version that servers must hold from now on."""
        with self._target.changed:
            self._target.published, self._target.canary = published, None
            for supervisor in self._supervisors.values():
                supervisor.is_behind(published.version, published.fingerprint)
            self._target.changed.notify_all()

    def _writer(self, version: int) -> VersionWriter:
        return VersionWriter(self._weights_dir, version, min(self._config.bucket_bytes, _MAX_SHARD_BYTES))

    def _transfer(self, stream: CheckedStream, version: int) -> None:
        """Broadcast to all servers that answer; the others read the files, if there are any."""
        config = self._config
        started = time.monotonic()
        supervisors = self._claim_idle()
        for supervisor in supervisors:
            supervisor.is_behind(version, fingerprint="not known yet")
        writer = self._writer(version) if config.keep_copy or not supervisors else None
        shard: list[tuple[str, torch.Tensor]] = []

        def copied() -> Iterator[tuple[str, torch.Tensor]]:
            """The stream; writes it to files along the way."""
            num_bytes = 0
            for name, tensor in stream:
                if writer is not None:
                    shard.append((name, tensor))
                    num_bytes += tensor.nbytes
                    if num_bytes >= min(config.bucket_bytes, _MAX_SHARD_BYTES):
                        writer.add(shard)
                        num_bytes = 0
                yield name, tensor
            if writer is not None and shard:
                writer.add(shard)

        rest = copied()
        try:
            reached = self._broadcast(supervisors, rest, version)
            for _ in rest:  # a failed broadcast leaves the stream half-read
                pass
            folder = writer.publish() if writer is not None else None
            published = Published(version, stream.fingerprint, stream.num_bytes, folder)
            self._set(published)
            _all_at_once([partial(supervisor.refresh, _nothing, published, started) for supervisor in reached])
        except BaseException:
            if writer is not None:
                writer.discard()
            raise
        finally:
            for supervisor in supervisors:
                supervisor.claim.release()

    def _broadcast(
        self, supervisors: list[ServerSupervisor], tensors: Iterator[tuple[str, torch.Tensor]], version: int
    ) -> list[ServerSupervisor]:
        """Send to all of them; return those that have it: all, or none."""
        if not supervisors:
            return []
        try:
            transfer.send(
                [supervisor.control() for supervisor in supervisors],
                tensors,
                version=version,
                in_flight=self._config.in_flight,
                bucket_bytes=self._config.bucket_bytes,
                seconds=self._config.sync_seconds,
            )
        except transfer.BroadcastFailed as error:
            log.warning("fleet: the broadcast of version %d failed: %s", version, error)
            return []
        return supervisors

    def _claim_idle(self) -> list[ServerSupervisor]:
        """The servers that answer, with the ``claim`` of each held."""
        claimed = []

        def claim(supervisor: ServerSupervisor) -> None:
            if supervisor.is_reachable() and supervisor.claim.acquire(timeout=self._config.silence_seconds):
                claimed.append(supervisor)

        _all_at_once([partial(claim, supervisor) for supervisor in self._all()])
        return claimed

    def _remove_old(self, version: int) -> None:
        """Keep the files of the newest version, of the one before it, and of any that a server is reading."""
        keep = {version - number for number in range(_NUM_KEPT)} | {supervisor.reading for supervisor in self._all()}
        remove_versions(self._weights_dir, {number for number in keep if number is not None})


def server_seed(seed: int, name: str) -> int:
    """A different seed for every server; vLLM's default is the same for all.

    >>> server_seed(0, "local-0") != server_seed(0, "local-1")
    True
    """
    return zlib.crc32(f"{seed} {name}".encode()) & 0x7FFF_FFFF


def _all_at_once(calls: list[Callable[[], object]]) -> None:
    """Run each call on its own thread and wait for all; each has a deadline."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _nothing(control: object, deadline: object) -> None:
    """Nothing to load: the weights have already arrived."""
