"""Device faults that a CPU cannot show, planted in the training step for tests/model/test_rehearsal.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from rehearsal_device import DEVICE

from nft_megatron.batching import batch, device, packing
from nft_megatron.model import packed_sequences, policy, step
from nft_megatron.model.topology import Topology

Fault = Callable[[Topology], contextlib.AbstractContextManager[Any]]


def planted(name: str | None, topology: Topology) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if name is None else FAULTS[name](topology)


def _around(owner: Any, name: str, change: Callable[..., Any]) -> Fault:
    """``owner.name`` replaced by ``change(original, *arguments)``."""

    def fault(topology: Topology) -> contextlib.AbstractContextManager[Any]:
        original = getattr(owner, name)
        return mock.patch.object(owner, name, lambda *arguments, **options: change(original, *arguments, **options))

    return fault


def _host_zeros(over_all: Any, trainer: Any, rows: Any, width: int, **others: Any) -> Any:
    """What `update` once did: the sums of all micro-batches, starting from zeros in host memory."""
    return over_all(trainer, [sum(rows, start=torch.zeros(width, dtype=torch.float64))], width, **others)


@contextlib.contextmanager
def _pageable(topology: Topology) -> Iterator[None]:
    """Copies that are to run beside the host, from memory that is not pinned."""

    def to_device(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
        return tensor.to(place, non_blocking=True)

    with contextlib.ExitStack() as stack:
        for module in (device, batch, packing, packed_sequences):
            stack.enter_context(mock.patch.object(module, "to_device", to_device))
        yield


def _host_collective(over_all: Any, trainer: Any, rows: Any, width: int, **others: Any) -> Any:
    dist.all_reduce(torch.zeros(1), group=trainer.topology.replica_group)
    return over_all(trainer, rows, width, **others)


def _item(sums: Any, trainer: Any, micro_batch: Any, logprob_N: torch.Tensor) -> Any:
    assert logprob_N.sum().item() <= 0
    return sums(trainer, micro_batch, logprob_N)


def _host_index(at: Any, model: Any, hidden: torch.Tensor, loss_positions_N: torch.Tensor) -> Any:
    return hidden[:, 0][loss_positions_N.cpu()]


def _host_generator(over_all: Any, trainer: Any, rows: Any, width: int, **others: Any) -> Any:
    torch.rand(3, device=DEVICE, generator=torch.Generator())
    return over_all(trainer, rows, width, **others)


@contextlib.contextmanager
def _host_states(topology: Topology) -> Iterator[None]:
    """Megatron's tracker gets the states of a checkpoint that a CPU wrote."""
    states = dict.fromkeys(get_cuda_rng_tracker().get_states(), torch.get_rng_state())
    get_cuda_rng_tracker().set_states(states)
    with get_cuda_rng_tracker().fork():
        yield


def _unfinished_copy(over_all: Any, trainer: Any, rows: Any, width: int, **others: Any) -> Any:
    """The sums go to the host without waiting, and are added up there at once."""
    on_host = torch.stack(list(rows)).to("cpu", non_blocking=True)
    return over_all(trainer, [on_host.sum(0)], width, **others)


FAULTS: dict[str, Fault] = {
    "zeros in host memory": _around(step.Trainer, "_over_all", _host_zeros),
    "a tensor that was not moved": _around(packed_sequences, "to_device", lambda move, tensor, place: tensor),
    "memory that is not pinned": _pageable,
    "a host tensor in a collective of NCCL": _around(step.Trainer, "_over_all", _host_collective),
    "an item in every micro-batch": _around(step.Trainer, "_sums", _item),
    "an index in host memory": _around(policy.PolicyModel, "_at_loss_positions", _host_index),
    "a generator of the CPU": _around(step.Trainer, "_over_all", _host_generator),
    "states of a CPU's generators": _host_states,
    "a copy read before it has arrived": _around(step.Trainer, "_over_all", _unfinished_copy),
}
