"""Decisions that all ranks share: if one rank acts or fails, every rank learns of it.

Otherwise a rank that finds a wrong file would leave the others waiting in a collective until its deadline. The others may wait
long for rank 0, which collects; rank 0 never waits longer for them than for a collective, or a rank that is stopped would hold
the whole run for hours.
"""

from __future__ import annotations

import datetime
import pickle
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nft_megatron.model.topology import Topology

T = TypeVar("T")


def on_main(topology: Topology, action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0; every rank returns its (small, picklable) result or raises its exception.

    The others wait for rank 0 until the control group's deadline; rank 0 waits for them, to take the result, as long as for a
    collective.
    """
    result, failure = _attempt(action) if topology.is_main else (None, None)
    sent = pickle.dumps((result, _sendable(failure))) if topology.is_main else b""
    size = torch.tensor([len(sent)])
    _broadcast(topology, size, topology.timeout if topology.is_main else None)
    data = (
        torch.frombuffer(bytearray(sent), dtype=torch.uint8) if topology.is_main else torch.empty(int(size), dtype=torch.uint8)
    )
    _broadcast(topology, data, topology.timeout)
    if not topology.is_main:
        result, failure = pickle.loads(data.numpy().tobytes())
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def together(topology: Topology, action: Callable[[], T], *, is_short: bool = False) -> T:
    """Run ``action`` on every rank and return each rank's own result.

    If it failed anywhere, every rank raises: its own failure, else that of the lowest-numbered rank. ``action`` may contain
    collectives as long as all ranks fail before or after them. If it ``is_short``, ranks wait for each other as long as for a
    collective, else until the control group's deadline.
    """
    result, failure = _attempt(action)
    failures: list[Exception | None] = [None] * topology.world_size
    group = topology.host_group if is_short else topology.control_group
    dist.all_gather_object(failures, _sendable(failure), group=group)
    failures.insert(0, failure)
    for other in failures:
        if other is not None:
            raise other
    return result  # type: ignore[return-value]


def first_of(topology: Topology, value: str | None) -> str | None:
    """The value of the lowest-numbered rank that has one, the same on every rank."""
    values: list[str | None] = [None] * topology.world_size
    dist.all_gather_object(values, value, group=topology.host_group)
    return next((other for other in values if other is not None), None)


def _broadcast(topology: Topology, tensor: Tensor, timeout: datetime.timedelta | None) -> None:
    """From rank 0 over the control group. Gloo's root waits as well, until the others are there to receive."""
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    if timeout is not None:
        options.timeout = timeout
    topology.control_group.broadcast([tensor], options).wait()


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _sendable(failure: Exception | None) -> Exception | None:
    """``failure``, or its text if it cannot be sent between processes."""
    try:
        pickle.loads(pickle.dumps(failure))
    except Exception:
        assert failure is not None
        return RuntimeError("".join(traceback.format_exception(failure)))
    return failure
