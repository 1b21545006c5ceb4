"""The plan of a ``torch_dist`` checkpoint that Megatron-Core loads under any layout, made without Megatron-Core.

In addition to the weights it needs ``metadata.json``, ``common.pt`` and an ``_extra_state`` object for every module that may
ask for one: linear layers (where Transformer Engine keeps the state of 8-bit training; Megatron's own layers ask too), and
norms that are separate modules (only Transformer Engine's ask). All are empty.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nft_megatron.base.errors import UserError
from nft_megatron.convert.archive import saved_bytes, tensor_frame
from nft_megatron.convert.blocks import Box, StoredTensor, matrix, source_blocks
from nft_megatron.convert.plan import Target
from nft_megatron.convert.torch_dist import Place, places
from nft_megatron.weights.table import Entry, Layout, WeightTable
from nft_megatron.weights.torch_dist_index import METADATA

MAX_FILE_BYTES = 5_000_000_000
MAX_CHUNK_BYTES = 64 << 20
"""A rank that loads part of a chunk reads all of it, so large matrices are split by rows."""


@dataclass
class _Files:
    """Allocates space in files of at most ``MAX_FILE_BYTES``, in sequence."""

    folder: Path
    sizes: dict[Path, int]

    def take(self, num_bytes: int) -> tuple[Path, int]:
        """A file and the offset of ``num_bytes`` in it."""
        file = self.folder / f"__{max(len(self.sizes) - 1, 0)}_0.distcp"
        if self.sizes.get(file, 0) + num_bytes > MAX_FILE_BYTES and self.sizes.get(file):
            file = self.folder / f"__{len(self.sizes)}_0.distcp"
        offset = self.sizes.get(file, 0)
        self.sizes[file] = offset + num_bytes
        return file, offset


def plan_torch_dist(folder: Path, table: WeightTable, dtypes: Mapping[str, torch.dtype]) -> Target:
    """Where every tensor goes.

    Raises:
        UserError: if tensors that make up one parameter have different dtypes.
    """
    files = _Files(folder, {})
    tensors: dict[str, StoredTensor] = {}
    parts: list[tuple[Path, int, bytes]] = []
    keys: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    by_name = places(table)
    empty = saved_bytes([None])
    for key in _extra_states(by_name.values()):
        file, offset = files.take(len(empty))
        parts.append((file, offset, empty))
        keys[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _StorageInfo(file.name, offset, len(empty))
    for entry in table.entries:
        if not entry.exported:
            continue
        place, dtype = by_name[entry.name], _dtype(entry, dtypes)
        shape = entry.local_shape(1, entry.shapes[0][entry.axis])
        boxes = []
        for start, stop in _cuts(entry, shape, dtype.itemsize):
            sizes = (*(1 for _ in place.index), stop - start, *shape[1:])
            frame = tensor_frame(dtype, sizes)
            num_bytes = math.prod(sizes) * dtype.itemsize
            length = len(frame.before) + num_bytes + len(frame.after)
            file, offset = files.take(length)
            data = offset + len(frame.before)
            parts += [(file, offset, frame.before), (file, data + num_bytes, frame.after)]
            boxes.append(Box(file, data, start, stop - start, 0, matrix(shape)[1]))
            offsets = torch.Size((*place.index, start, *(0 for _ in shape[1:])))
            known = keys.setdefault(
                place.key,
                TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size((*place.counts, *shape)), chunks=[]),
            )
            assert isinstance(known, TensorStorageMetadata)
            storage[MetadataIndex(place.key, offsets, len(known.chunks))] = _StorageInfo(file.name, offset, length)
            known.chunks.append(ChunkStorageMetadata(offsets, torch.Size(sizes)))
        blocks_of = source_blocks(entry, entry.pieces(1, 0, shape[entry.axis]), boxes, dtype.itemsize)
        for name, source_shape, blocks in zip(entry.sources, entry.shapes, blocks_of, strict=True):
            tensors[name] = StoredTensor(name, dtype, source_shape, tuple(blocks))
    index = io.BytesIO()
    pickle.dump(Metadata(keys, storage_data=storage, version="1.0.0"), index)
    small = {
        METADATA: index.getvalue(),
        "common.pt": saved_bytes({"checkpoint_version": 3.0, "iteration": 0}),
        "metadata.json": json.dumps(
            {
                "sharded_backend": "torch_dist",
                "sharded_backend_version": 1,
                "common_backend": "torch",
                "common_backend_version": 1,
            }
        ).encode(),
    }
    return Target(folder, tensors, files.sizes, tuple(parts), small)


def _dtype(entry: Entry, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    found = {dtypes[name] for name in entry.sources}
    if len(found) > 1:
        text = ", ".join(f"{name} is {str(dtypes[name]).removeprefix('torch.')}" for name in entry.sources)
        raise UserError(
            "dtype", entry.name, f"consists of tensors of different dtypes: {text}", "choose one for all with --dtype"
        )
    return found.pop()


def _cuts(entry: Entry, shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """Rows of each chunk: equal parts, with a cut between gate and up."""
    row_bytes = matrix(shape)[1] * itemsize
    alone = len(entry.sources) == 1 or entry.layout is not Layout.SPLIT
    lengths = [shape[0]] if alone else [source[0] for source in entry.shapes]
    start = 0
    for length in lengths:
        num_chunks = max(1, min(length, -(-length * row_bytes // MAX_CHUNK_BYTES)))
        for number in range(num_chunks):
            yield start + length * number // num_chunks, start + length * (number + 1) // num_chunks
        start += length


def _extra_states(stored: Iterable[Place]) -> Iterator[str]:
    """The keys of the empty objects, as ShardedObject.unique_key makes them (dist_checkpointing/mapping.py)."""
    for place in stored:
        module, _, parameter = place.key.rpartition(".")
        last = module.rpartition(".")[2]
        if parameter == "weight" and (last.startswith("linear_") or last.endswith("layernorm")):
            offset = ".".join(map(str, place.index or (0,)))
            shape = ".".join(map(str, place.counts or (1,)))
            yield f"{module}._extra_state/shard_{offset}_{shape}"
