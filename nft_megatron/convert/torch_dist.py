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

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from nft_megatron.base.errors import UserError
from nft_megatron.convert.blocks import Box, StoredTensor, covers, matrix, source_blocks
from nft_megatron.convert.checkpoint import Checkpoint, Problem, compare_copies, compare_with_table
from nft_megatron.convert.foreign import NOT_WEIGHTS, note_on_prefix, refuse_names, shared_prefix
from nft_megatron.convert.manifest import NAME as MANIFEST
from nft_megatron.convert.manifest import read_manifest, sha256
from nft_megatron.weights.archive import Checksum, TensorAt, read_archive
from nft_megatron.weights.table import Entry, Layout, WeightTable, is_buffer, note_on_buffers
from nft_megatron.weights.torch_dist_index import METADATA, Chunk, StoredKey, read_index

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.(\d+)\.(.+)$")
_MOST_PADDING = 128 * 64
"""Megatron pads the vocabulary to a multiple of 128 rows per tensor rank; more rows mean another vocabulary."""


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
    """The weights of a checkpoint saved under any layout; optimizer state, and a prefix of all names, are ignored.

    Raises:
        UserError: naming ``field`` for missing, truncated or unreadable files, and for what ``foreign.py`` refuses.
    """
    _compare_with_manifest(folder, field)
    stored = read_index(folder, field).tensors
    refuse_names(stored, folder, field)
    prefix = shared_prefix(stored)
    keys = {key.removeprefix(prefix): value for key, value in stored.items()}
    found: dict[str, StoredTensor] = {}
    copies: dict[str, tuple[StoredTensor, str]] = {}
    problems: list[Problem] = []
    notes = [*note_on_prefix(prefix)]
    used: set[str] = set()
    by_index: dict[str, dict[tuple[int, ...], list[Chunk]]] = {}
    with ExitStack() as stack:
        read = _ChunkReader(folder, field, stack)
        for entry, place in _stored_places(table, keys):
            used.add(place.key)
            if place.key in keys:
                size = keys[place.key].size
                problem, note = _misfit(entry, place, size)
                notes += [note] if note else []
                if problem:
                    problems.append(Problem("shape", entry.sources[0], f"in {folder / METADATA}: {problem}"))
                    used.update(entry.sources)
                    continue
                if place.key not in by_index:
                    by_index[place.key] = _by_index(keys[place.key].chunks, len(place.index))
                read_entry = _read_entry(entry, place, size, by_index[place.key].get(place.index, []), read, problems)
                if entry.exported:
                    found |= read_entry
                for name in () if entry.exported else read_entry:
                    copies[place.key] = read_entry[name], name
    for key in sorted(keys.keys() - used):
        if not NOT_WEIGHTS.search(key) and not is_buffer(key):
            problems.append(Problem("unexpected", key, f"is a key of {folder} but not of the model that config.json describes"))
    tensors, of_table = compare_with_table(found, table, folder)
    problems += [problem for problem in of_table if not (problem.kind == "missing" and _reported(problem.name, problems))]
    differing, equal = compare_copies(copies, tensors, field)
    problems = [*differing, *problems]
    notes += [*equal, *note_on_buffers(keys)]
    return Checkpoint(folder, "torch_dist", tensors, tuple(problems), tuple(notes))


def _reported(name: str, problems: Sequence[Problem]) -> bool:
    return any(problem.name == name for problem in problems)


def _stored_places(table: WeightTable, keys: Mapping[str, StoredKey]) -> Iterator[tuple[Entry, Place]]:
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


def _compare_with_manifest(folder: Path, field: str) -> None:
    manifest = read_manifest(folder, field)
    if manifest is not None and sha256([(folder / METADATA).read_bytes()]) != manifest.files.get(METADATA):
        raise UserError(field, folder / METADATA, f"differs from {MANIFEST}", "copy the checkpoint again")


def _by_index(chunks: Sequence[Chunk], leading: int) -> dict[tuple[int, ...], list[Chunk]]:
    """The chunks that hold part of each layer, or of each expert of a layer."""
    found: dict[tuple[int, ...], list[Chunk]] = {}
    for chunk in chunks:
        if 0 in chunk.sizes:
            continue
        ranges = [range(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        for index in itertools.product(*ranges[:leading]):
            found.setdefault(index, []).append(chunk)
    return found


class _ChunkReader:
    """Finds the tensor in a chunk's archive. Files stay open until ``stack`` closes."""

    def __init__(self, folder: Path, field: str, stack: ExitStack) -> None:
        self._folder, self._field, self._stack = folder, field, stack
        self._open: dict[str, tuple[int, int]] = {}
        self._known: dict[Chunk, TensorAt] = {}  # one chunk may hold several layers

    def __call__(self, chunk: Chunk, key: str) -> TensorAt:
        if chunk not in self._known:
            self._known[chunk] = self._read(chunk, key)
        return self._known[chunk]

    def _read(self, chunk: Chunk, key: str) -> TensorAt:
        stored = chunk.stored
        path = self._folder / stored.file
        if stored.file not in self._open:
            if not path.is_file():
                raise UserError(self._field, self._folder, f"lacks its file {stored.file}", "copy the checkpoint again")
            descriptor = os.open(path, os.O_RDONLY)
            self._stack.callback(os.close, descriptor)
            self._open[stored.file] = descriptor, path.stat().st_size
        descriptor, size = self._open[stored.file]
        if stored.start + stored.num_bytes > size:
            raise UserError(
                self._field,
                path,
                f"is truncated: {key} ends at byte {stored.start + stored.num_bytes}, but the file at {size}",
                "copy or rewrite the checkpoint",
            )
        tensor = read_archive(path, descriptor, stored.start, stored.num_bytes, self._field)
        if not isinstance(tensor, TensorAt) or math.prod(tensor.shape) != math.prod(chunk.sizes):
            raise UserError(
                self._field,
                path,
                f"does not hold {key} of shape {list(chunk.sizes)} at byte {stored.start}",
                "copy or rewrite the checkpoint",
            )
        return tensor


def _read_entry(
    entry: Entry,
    place: Place,
    size: tuple[int, ...],
    chunks: Sequence[Chunk],
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
