"""A process group of the trainer's rank 0 and the servers' workers, separate from the trainer's own groups, and its buckets.

Both sides use it: the trainer to send (``transfer.py``), vLLM's workers to receive (``worker_extension.py``). gloo on CPUs,
NCCL on GPUs. A bucket is one flat byte tensor, so a broadcast does not depend on the number of tensors in it.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nft_megatron.rollout.fleet.nccl import agree

_ALIGNMENT = 64
SENDER = 0


@dataclass(frozen=True)
class Slot:
    """The place of one tensor in a bucket."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize


def fill_buckets(
    tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int, device: torch.device
) -> Iterator[tuple[list[Slot], torch.Tensor]]:
    """Cut a stream into buckets of at most ``max_bytes`` on ``device``: ``(slots, bytes)``, reusing one buffer.

    A larger tensor gets its own bucket. Only one bucket and the stream's current tensor are in memory at a time.

    >>> stream = [("a", torch.zeros(20)), ("b", torch.ones(30)), ("c", torch.ones(2))]
    >>> [[slot.name for slot in slots] for slots, _ in fill_buckets(stream, 256, torch.device("cpu"))]
    [['a', 'b'], ['c']]
    """
    buffer = torch.empty(max_bytes, dtype=torch.uint8, device=device)
    slots: list[Slot] = []
    end = 0
    for name, tensor in tensors:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        if slots and start + tensor.nbytes > max_bytes:
            yield slots, buffer[:end]
            slots, start = [], 0
        slot = Slot(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), start)
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        if tensor.nbytes > max_bytes:
            yield [slot], flat.to(device)
            end = 0
        else:
            buffer[start : start + tensor.nbytes].copy_(flat)
            slots.append(slot)
            end = start + tensor.nbytes
    if slots:
        yield slots, buffer[:end]


def open_bucket(slots: Sequence[Slot], flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in a bucket, as views of it."""
    for slot in slots:
        part = flat[slot.offset : slot.offset + slot.num_bytes]
        yield slot.name, part.view(getattr(torch, slot.dtype)).view(slot.shape)


class Group:
    """One rank of the process group that meets at ``store``. ``seconds`` limits the meeting and each broadcast.

    NCCL has no such limit: torch's watchdog ends the whole process instead, after twice as long. The sender enforces the limit.
    A receiver with another version of NCCL than the sender raises ``RuntimeError``.
    """

    def __init__(self, store: dist.Store, rank: int, num_ranks: int, device: torch.device, seconds: float) -> None:
        self._group: Any  # torch has no public name for what these two have in common
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            agree(store, rank, ".".join(map(str, torch.cuda.nccl.version())))
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = datetime.timedelta(seconds=2 * seconds)
            self._group = dist.ProcessGroupNCCL(store, rank, num_ranks, options)
        else:
            self._group = dist.ProcessGroupGloo(store, rank, num_ranks, datetime.timedelta(seconds=seconds))

    def broadcast(self, flat: torch.Tensor) -> None:
        """Send ``flat`` to all ranks, or receive it in place; return once it has arrived."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = SENDER, 0
        self._group.broadcast([flat], options).wait()
        if flat.is_cuda:
            torch.cuda.synchronize(flat.device)

    def close(self) -> None:
        """Leave the group. With gloo, freeing it closes its connections, so ranks waiting in a broadcast fail at once."""
        if self._on_gpu:
            self._group.abort()
        self._group = None
