"""Decisions that all ranks share: if one rank acts or fails, every rank learns of it.

Otherwise a rank that finds a wrong file would leave the others waiting in a collective until its deadline.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from nft_megatron.model.topology import Topology

T = TypeVar("T")


def on_main(topology: Topology, action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0; every rank returns its (small, picklable) result or raises its exception.

    Waits for rank 0 until the control group's deadline.
    """
    result, failure = _attempt(action) if topology.is_main else (None, None)
    shared = [result, _sendable(failure)]
    dist.broadcast_object_list(shared, src=0, group=topology.control_group)
    failure = failure or shared[1]  # type: ignore[assignment]
    if failure is not None:
        raise failure
    return shared[0]  # type: ignore[return-value]


def together(topology: Topology, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank and return each rank's own result.

    If it failed anywhere, every rank raises: its own failure, else that of the lowest-numbered rank. ``action`` may contain
    collectives as long as all ranks fail before or after them.
    """
    result, failure = _attempt(action)
    failures: list[Exception | None] = [None] * topology.world_size
    dist.all_gather_object(failures, _sendable(failure), group=topology.control_group)
    failures.insert(0, failure)
    for other in failures:
        if other is not None:
            raise other
    return result  # type: ignore[return-value]


def first_of(topology: Topology, value: str | None) -> str | None:
    """The value of the lowest-numbered rank that has one, the same on every rank."""
    values: list[str | None] = [None] * topology.world_size
    dist.all_gather_object(values, value, group=topology.control_group)
    return next((other for other in values if other is not None), None)


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
