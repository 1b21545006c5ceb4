"""Decisions that all ranks share: one rank acts or fails, every rank learns of it.

Without this a rank that meets a wrong file leaves the others waiting in a collective until its deadline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from nft_megatron.model.topology import Topology

T = TypeVar("T")


def on_main(topology: Topology, action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0; every rank returns its (small, picklable) result or raises its exception.

    Waits for rank 0, at most the control group's deadline.
    """
    result: list[object] = [None, None]
    if topology.is_main:
        try:
            result[0] = action()
        except Exception as error:
            result[1] = error
    _broadcast(topology, result)
    if isinstance(result[1], Exception):
        raise result[1]
    return result[0]  # type: ignore[return-value]


def together(topology: Topology, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank and return each rank's own result; if any failed, every rank raises its own or the
    lowest-numbered failure. ``action`` may contain collectives as long as all ranks fail before or after them."""
    failure: Exception | None = None
    result: T | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    failures: list[Exception | None] = [None] * topology.world_size
    dist.all_gather_object(failures, failure, group=topology.control_group)
    if failure is not None:
        raise failure
    for other in failures:
        if other is not None:
            raise other
    return result  # type: ignore[return-value]


def _broadcast(topology: Topology, objects: list[object]) -> None:
    if topology.world_size > 1:
        dist.broadcast_object_list(objects, src=0, group=topology.control_group)
