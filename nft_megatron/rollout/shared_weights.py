"""The current weights in one anonymous file that parent and workers share: written once, read by every worker.

The file has no name, so nothing is left behind when all processes die. The parent keeps it between loads for workers that
replace crashed ones.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from nft_megatron.weights.fingerprint import combine_digests, tensor_bytes, tensor_digest

_ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """The place of one tensor in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


def open_anonymous() -> int:
    """The descriptor of a new file without a name: in memory on Linux, elsewhere a temporary file that is deleted at once."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("nft-megatron-weights")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def write_weights(descriptor: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[list[Entry], str]:
    """Replace the file's contents with the stream, one tensor in memory at a time. Returns its table and its fingerprint."""
    entries, digests, offset = [], [], 0
    for name, tensor in tensors:
        entries.append(Entry(name, tensor.dtype, tuple(tensor.shape), offset))
        digests.append(tensor_digest(name, tensor))
        data = tensor_bytes(tensor)
        written = 0
        while written < len(data):  # one call writes 2 GiB at most
            written += os.pwrite(descriptor, data[written:], offset + written)
        offset = -(-(offset + len(data)) // _ALIGNMENT) * _ALIGNMENT
    return entries, combine_digests(digests)


def read_weights(descriptor: int, entries: list[Entry]) -> Iterator[tuple[str, torch.Tensor]]:
    """The file's tensors, as views that share its memory until they are written to."""
    memory = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    for entry in entries:
        count = torch.Size(entry.shape).numel()
        flat = torch.frombuffer(memory, dtype=entry.dtype, count=count, offset=entry.offset)
        yield entry.name, flat.view(entry.shape)
