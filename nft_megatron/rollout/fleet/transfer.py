"""Weights by broadcast: from the trainer's stream to the workers of all servers at once, bucket by bucket.

Every version gets a new process group of the servers that take part, so one that has died since is in nobody's way. Inside vLLM
the buckets go through its weight-transfer routes (``worker_extension.py``). If any server fails, the group is broken and the
broadcast fails for all of them: they stay paused and load the version's files instead.
"""

from __future__ import annotations

import datetime
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nft_megatron.base.background import in_background
from nft_megatron.base.deadline import Deadline
from nft_megatron.rollout.fleet.broadcast import SENDER, Group, Slot, fill_buckets
from nft_megatron.rollout.fleet.control import Control, ControlError, InFlight

T = TypeVar("T")

_CALL_SECONDS, _SLOWEST = 15.0, 50e6
"""A bucket is hung if it takes longer than these seconds plus its transfer at this rate (bytes/s)."""


class BroadcastFailed(RuntimeError):
    """A broadcast ended before all servers had received everything."""


def send(
    controls: Sequence[Control],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    version: int,
    in_flight: InFlight,
    bucket_bytes: int,
    seconds: float,
) -> None:
    """Broadcast the stream to all servers and tell them its version. It pauses them and leaves them paused.

    Raises ``BroadcastFailed`` if a server or the network fails, or after ``seconds``; the stream may then be half-read.
    Exceptions of the stream pass through.
    """
    deadline = Deadline.of(seconds)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        _on_all(controls, lambda control: control.pause(in_flight, deadline.left), deadline)
        _on_all(controls, lambda control: control.start_update(deadline.left), deadline)
        bucket_seconds = _CALL_SECONDS + bucket_bytes / _SLOWEST
        group = _make_group(controls, device, min(deadline.left, bucket_seconds))
    except (ControlError, RuntimeError) as error:
        raise BroadcastFailed(str(error)) from error
    try:
        for slots, flat in fill_buckets(tensors, bucket_bytes, device):
            _send_bucket(controls, group, slots, flat, min(deadline.left, bucket_seconds))
        _on_all(controls, lambda control: control.finish_update(version, deadline.left), deadline)
    except ControlError as error:
        raise BroadcastFailed(str(error)) from error
    finally:
        group.close()  # so that workers still waiting for the rest fail at once


def _send_bucket(controls: Sequence[Control], group: Group, slots: Sequence[Slot], flat: torch.Tensor, seconds: float) -> None:
    """Broadcast one bucket on another thread, so that this one can enforce the deadline if it hangs."""
    info = {"slots": [asdict(slot) for slot in slots], "num_bytes": flat.numel()}
    try:
        receiving = [in_background("fleet-transfer", partial(control.update, info, seconds)) for control in controls]
        _await([*receiving, in_background("fleet-transfer", partial(group.broadcast, flat))], Deadline.of(seconds))
    except (ControlError, RuntimeError) as error:
        raise BroadcastFailed(str(error)) from error


def _make_group(controls: Sequence[Control], device: torch.device, seconds: float) -> Group:
    """The group of this process and all workers of the servers."""
    deadline = Deadline.of(seconds)
    sizes = [future.result() for future in _on_all(controls, lambda control: control.num_workers(), deadline)]
    host = _own_address(controls)
    timeout = datetime.timedelta(seconds=seconds)
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
    num_ranks = 1 + sum(sizes)
    joining, first_rank = [], SENDER + 1
    for control, size in zip(controls, sizes, strict=True):
        joining.append(in_background("fleet-transfer", partial(control.join, host, store.port, first_rank, num_ranks, seconds)))
        first_rank += size
    mine = in_background("fleet-transfer", partial(Group, store, SENDER, num_ranks, device, seconds))
    _await([*joining, mine], deadline)
    return mine.result()


def _own_address(controls: Sequence[Control]) -> str:
    """The address at which servers reach this process: loopback if all of them are local."""
    local = all("//127.0.0.1:" in control.url or "//localhost:" in control.url for control in controls)
    return "127.0.0.1" if local else socket.gethostname()


def _on_all(controls: Sequence[Control], work: Callable[[Control], T], deadline: Deadline) -> list[Future[T]]:
    """Call ``work`` for all servers at once; raise the first failure, or ``ControlError`` at the deadline."""
    futures = [in_background("fleet-transfer", partial(work, control)) for control in controls]
    _await(futures, deadline)
    return futures


def _await(futures: Sequence[Future[Any]], deadline: Deadline) -> None:
    """Wait for all; raise the first failure at once, or ``ControlError`` at the deadline."""
    done = threading.Semaphore(0)
    for future in futures:
        future.add_done_callback(lambda _: done.release())
    for _ in futures:
        if not done.acquire(timeout=deadline.left):
            raise ControlError("the weight broadcast took too long", silent=True)
        for future in futures:
            if future.done() and (error := future.exception()) is not None:
                raise error
