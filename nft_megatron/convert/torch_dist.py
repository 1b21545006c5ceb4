"""Megatron-Core's ``torch_dist`` checkpoints: their tensors as blocks, and the plan of a checkpoint to write.

A ``torch_dist`` checkpoint is one of torch.distributed.checkpoint. ``.metadata`` gives, for every key, the shape of the whole
tensor and its stored chunks (boxes of it), and for each chunk a range of a ``.distcp`` file, which holds an archive of
``torch.save``. How a key is split does not restrict who can read it, so reading or writing one needs no layout.

Keys are the names of the model's parameters without the numbers of layers and experts; these are leading axes instead, if
the checkpoint was saved with them (Megatron's default, see transformer/transformer_block.py and transformer/moe/experts.py):

    decoder.layers.7.mlp.linear_fc2.weight                         decoder.layers.mlp.linear_fc2.weight, index (7,)
    decoder.layers.7.mlp.experts.local_experts.5.linear_fc1.weight decoder.layers.mlp.experts.experts.linear_fc1.weight, (7, 5)

The rest of a key's axes are those of the parameter on one tensor rank: query groups q…k v in sequence, gate above up.
"""

from __future__ import annotations

import collections
import itertools
import math
import os
import pathlib
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import (
    TensorStorageMetadata,
)

from nft_megatron.base.errors import UserError
from nft_megatron.convert.archive import SafeUnpickler, TensorAt, read_archive
from nft_megatron.convert.blocks import Box, Checksum, StoredTensor, covers, matrix, source_blocks
from nft_megatron.convert.checkpoint import Checkpoint, Problem, compare_copies, compare_with_table
from nft_megatron.convert.manifest import NAME as MANIFEST
from nft_megatron.convert.manifest import read_manifest, sha256
from nft_megatron.weights.table import Entry, Layout, WeightTable, is_buffer, note_on_buffers

METADATA = ".metadata"

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.(\d+)\.(.+)$")
_NOT_WEIGHTS = re.compile(r"(^|\.)optimizer\.|^rng_state|^rerun_state")
_MOST_PADDING = 128 * 64
"""Megatron pads the vocabulary to a multiple of 128 rows per tensor rank; more rows mean another vocabulary."""


def _memory_format(enumeration: Any, name: str) -> Any:
    """``getattr``, with which Python before 3.11.4 pickles enumeration members, restricted to metadata's one enumeration."""
    if enumeration is not metadata._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"getattr of {enumeration}")
    return enumeration[name]


_ALLOWED: Mapping[str, Any] = {
    "builtins.getattr": _memory_format,
    **{
        f"torch.distributed.checkpoint.metadata.{name}": getattr(metadata, name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    },
    "torch.distributed.checkpoint.filesystem._StorageInfo": filesystem._StorageInfo,
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": lambda name: torch.strided,
    "collections.OrderedDict": collections.OrderedDict,
    "pathlib.PosixPath": pathlib.PurePosixPath,
}


@dataclass(frozen=True)
class Place:
    """A parameter in a checkpoint: ``index`` counts along the leading axes of ``key``, whose lengths are ``counts``."""

    key: str
    index: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()


def places(table: WeightTable) -> dict[str, Place]:
    """The key and index of every stored parameter of the table, by name, with layers and experts as leading axes."""
    split = {entry.name: _numbers(entry.name) for entry in table.entries if entry.exported}
    num_layers = 1 + max((numbers[0] for _, numbers in split.values() if numbers), default=0)
    num_experts = 1 + max((numbers[1] for _, numbers in split.values() if len(numbers) > 1), default=0)
    return {name: Place(key, index, (num_layers, num_experts)[: len(index)]) for name, (key, index) in split.items()}


def _numbers(name: str) -> tuple[str, tuple[int, ...]]:
    """A parameter's key and index.

    >>> _numbers("decoder.layers.7.mlp.experts.local_experts.5.linear_fc1.weight")
    ('decoder.layers.mlp.experts.experts.linear_fc1.weight', (7, 5))
    """
    if not (of_layer := _LAYER.match(name)):
        return name, ()
    layer, rest = int(of_layer[1]), of_layer[2]
    if not (of_expert := _EXPERT.match(rest)):
        return f"decoder.layers.{rest}", (layer,)
    return f"decoder.layers.mlp.experts.experts.{of_expert[2]}", (layer, int(of_expert[1]))


# ---------------------------------------------------------------------------------------------------------------- reading


def open_torch_dist(folder: Path, table: WeightTable, field: str) -> Checkpoint:
    """The weights of a checkpoint saved under any layout; optimizer state and all other keys are ignored.

    Raises:
        UserError: naming ``field`` for missing, truncated or unreadable files.
    """
    keys, chunks = _read_metadata(folder / METADATA, field)
    found: dict[str, StoredTensor] = {}
    copies: dict[str, tuple[StoredTensor, str]] = {}
    problems: list[Problem] = []
    notes: list[str] = []
    used: set[str] = set()
    by_index: dict[str, dict[tuple[int, ...], list[_Chunk]]] = {}
    with ExitStack() as stack:
        read = _ChunkReader(folder, field, stack)
        for entry, place in _stored_places(table, keys):
            used.add(place.key)
            if place.key in keys:
                size = tuple(keys[place.key].size)
                problem, note = _misfit(entry, place, size)
                notes += [note] if note else []
                if problem:
                    problems.append(Problem("shape", entry.sources[0], f"in {folder / METADATA}: {problem}"))
                    used.update(entry.sources)
                    continue
                if place.key not in by_index:
                    by_index[place.key] = _by_index(chunks.get(place.key, []), len(place.index))
                read_entry = _read_entry(entry, place, size, by_index[place.key].get(place.index, []), read, problems)
                if entry.exported:
                    found |= read_entry
                for name in () if entry.exported else read_entry:
                    copies[place.key] = read_entry[name], name
    for key in sorted(keys.keys() - used):
        if not _NOT_WEIGHTS.search(key) and not is_buffer(key):
            problems.append(Problem("unexpected", key, f"is a key of {folder} but not of the model that config.json describes"))
    tensors, of_table = compare_with_table(found, table, folder)
    problems += [problem for problem in of_table if not (problem.kind == "missing" and _reported(problem.name, problems))]
    differing, equal = compare_copies(copies, tensors, field)
    problems = [*differing, *problems]
    notes += [*equal, *note_on_buffers(keys)]
    return Checkpoint(folder, "torch_dist", tensors, tuple(problems), tuple(notes))


def _reported(name: str, problems: Sequence[Problem]) -> bool:
    return any(problem.name == name for problem in problems)


def _stored_places(table: WeightTable, keys: Mapping[str, TensorStorageMetadata]) -> Iterator[tuple[Entry, Place]]:
    """Entries and their keys. If layers are not all alike, Megatron keeps their numbers in the keys: try both.

    An entry that is a second copy has a place only if it is stored.
    """
    by_name = places(table)
    for entry in table.entries:
        if entry.exported:
            place = by_name[entry.name]
            if place.key not in keys and place.index and (of_layer := _LAYER.match(entry.name)):
                rest = place.key.removeprefix("decoder.layers.")
                numbered = Place(f"decoder.layers.{of_layer[1]}.{rest}", place.index[1:], place.counts[1:])
                place = numbered if numbered.key in keys else place
            yield entry, place
        elif entry.name in keys:
            yield entry, Place(entry.name)


def _misfit(entry: Entry, place: Place, size: tuple[int, ...]) -> tuple[str | None, str | None]:
    """The problem with a key's shape, or a note about a correct one."""
    leading, shape = size[: len(place.counts)], size[len(place.counts) :]
    if entry.layout is Layout.VOCABULARY and len(shape) == len(entry.shapes[0]):
        vocab = entry.shapes[0][entry.axis]
        if 0 < shape[entry.axis] - vocab < _MOST_PADDING:
            expected = entry.local_shape(1, shape[entry.axis])
            note = f"{place.key}: rows {vocab} to {shape[entry.axis]} are padding and ignored"
            return (None, note) if shape == expected else (f"{place.key} has shape {list(size)}", None)
    expected = entry.local_shape(1, entry.shapes[0][entry.axis])
    if leading != place.counts or shape != expected:
        return f"{place.key} has shape {list(size)}, but config.json implies {[*place.counts, *expected]}", None
    return None, None


@dataclass(frozen=True)
class _Chunk:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    num_bytes: int


def _read_metadata(path: Path, field: str) -> tuple[dict[str, TensorStorageMetadata], dict[str, list[_Chunk]]]:
    """The tensor keys, and the chunks of each."""
    manifest = read_manifest(path.parent, field)
    if manifest is not None and sha256([path.read_bytes()]) != manifest.files.get(METADATA):
        raise UserError(field, path, f"differs from {MANIFEST}", "copy the checkpoint again")
    try:
        with path.open("rb") as file:
            content = SafeUnpickler(file, _ALLOWED).load()
        keys = {key: value for key, value in content.state_dict_metadata.items() if isinstance(value, TensorStorageMetadata)}
        stored = {
            (index.fqn, tuple(index.offset)): info for index, info in content.storage_data.items() if index.offset is not None
        }
        chunks: dict[str, list[_Chunk]] = {}
        for key, value in keys.items():
            for chunk in value.chunks:
                info = stored[key, tuple(chunk.offsets)]
                chunks.setdefault(key, []).append(
                    _Chunk(tuple(chunk.offsets), tuple(chunk.sizes), info.relative_path, info.offset, info.length)
                )
    except OSError:
        raise
    except Exception as error:  # a damaged file may raise anything, even MemoryError
        raise UserError(
            field, path, f"is not the metadata of a torch_dist checkpoint ({error!r})", "copy or rewrite the checkpoint"
        ) from error
    return keys, chunks


def _by_index(chunks: Sequence[_Chunk], leading: int) -> dict[tuple[int, ...], list[_Chunk]]:
    """The chunks that hold part of each layer, or of each expert of a layer."""
    found: dict[tuple[int, ...], list[_Chunk]] = {}
    for chunk in chunks:
        ranges = [range(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        for index in itertools.product(*ranges[:leading]):
            found.setdefault(index, []).append(chunk)
    return found


class _ChunkReader:
    """Finds the tensor in a chunk's archive. Files stay open until ``stack`` closes."""

    def __init__(self, folder: Path, field: str, stack: ExitStack) -> None:
        self._folder, self._field, self._stack = folder, field, stack
        self._open: dict[str, tuple[int, int]] = {}
        self._known: dict[_Chunk, TensorAt] = {}  # one chunk may hold several layers

    def __call__(self, chunk: _Chunk, key: str) -> TensorAt:
        if chunk not in self._known:
            self._known[chunk] = self._read(chunk, key)
        return self._known[chunk]

    def _read(self, chunk: _Chunk, key: str) -> TensorAt:
        path = self._folder / chunk.file
        if chunk.file not in self._open:
            if Path(chunk.file).name != chunk.file or not path.is_file():
                raise UserError(self._field, self._folder, f"lacks its file {chunk.file}", "copy the checkpoint again")
            descriptor = os.open(path, os.O_RDONLY)
            self._stack.callback(os.close, descriptor)
            self._open[chunk.file] = descriptor, path.stat().st_size
        descriptor, size = self._open[chunk.file]
        if chunk.start + chunk.num_bytes > size:
            raise UserError(
                self._field,
                path,
                f"is truncated: {key} ends at byte {chunk.start + chunk.num_bytes}, but the file at {size}",
                "copy or rewrite the checkpoint",
            )
        tensor = read_archive(path, descriptor, chunk.start, chunk.num_bytes, self._field)
        if not isinstance(tensor, TensorAt) or math.prod(tensor.shape) != math.prod(chunk.sizes):
            raise UserError(
                self._field,
                path,
                f"does not hold {key} of shape {list(chunk.sizes)} at byte {chunk.start}",
                "copy or rewrite the checkpoint",
            )
        return tensor


def _read_entry(
    entry: Entry,
    place: Place,
    size: tuple[int, ...],
    chunks: Sequence[_Chunk],
    read: _ChunkReader,
    problems: list[Problem],
) -> dict[str, StoredTensor]:
    """The Hugging Face tensors of one parameter, which is stored in ``chunks``."""
    leading = len(place.index)
    shape = size[leading:]
    boxes: list[Box] = []
    checksums: list[Checksum] = []
    dtypes: set[torch.dtype] = set()
    for chunk in chunks:
        tensor = read(chunk, place.key)
        dtypes.add(tensor.dtype)
        first = 0  # first of the chunk's elements that belong to this layer and expert
        for index, offset, length in zip(place.index, chunk.offsets, chunk.sizes, strict=False):
            first = first * length + index - offset
        num_rows, num_columns = matrix(chunk.sizes[leading:])
        position = tensor.offset + first * num_rows * num_columns * tensor.dtype.itemsize
        row, column = chunk.offsets[leading], chunk.offsets[leading + 1] if len(shape) > 1 else 0
        boxes.append(Box(tensor.checksum.file, position, row, num_rows, column, num_columns))
        if tensor.checksum.crc32:  # 0: written without one
            checksums.append(tensor.checksum)
    if len(dtypes) != 1:
        text = f"is stored in chunks of {' and '.join(sorted(map(str, dtypes))) or 'no dtype at all'} under {place.key}"
        problems.extend(Problem("dtype" if dtypes else "missing", name, text) for name in entry.sources)
        return {}
    (dtype,) = dtypes
    pieces = entry.pieces(1, 0, shape[entry.axis])
    tensors = {}
    blocks_of = source_blocks(entry, pieces, boxes, dtype.itemsize)
    for name, source_shape, blocks in zip(entry.sources, entry.shapes, blocks_of, strict=True):
        if covers(blocks, math.prod(source_shape) * dtype.itemsize):
            ordered = tuple(sorted(blocks, key=lambda block: (block.row, block.column)))
            tensors[name] = StoredTensor(name, dtype, source_shape, ordered, tuple(checksums))
        else:
            problems.append(Problem("missing", name, f"is only partly stored under {place.key}"))
    return tensors
