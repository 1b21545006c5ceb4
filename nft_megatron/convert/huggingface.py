"""Hugging Face folders: their tensors as blocks, and the plan of a folder to write."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from nft_megatron.convert.blocks import StoredTensor, whole
from nft_megatron.convert.checkpoint import Checkpoint, Problem, compare_copies, compare_with_table
from nft_megatron.convert.plan import Target
from nft_megatron.weights.hf_reader import DTYPES, INDEX, HFReader
from nft_megatron.weights.hf_writer import cut_into_shards, index_json, shard_names
from nft_megatron.weights.table import WeightTable, note_on_buffers

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def open_huggingface(folder: Path, table: WeightTable | None, field: str) -> Checkpoint:
    """A folder with safetensors weights; without a ``table``, all tensors it contains.

    Raises:
        UserError: naming ``field`` for missing, truncated or unreadable files.
    """
    with HFReader(folder, field) as reader:
        found = {name: whole(name, place.dtype, place.shape, place.file, place.offset) for name, place in reader.places.items()}
    problems: list[Problem] = []
    notes: tuple[str, ...] = ()
    if table is not None:
        stored = found
        found, problems = compare_with_table(stored, table, folder)
        copies = {name: (stored[name], table.copies[name]) for name in stored.keys() & table.copies.keys()}
        differing, equal = compare_copies(copies, found, field)
        problems = [*differing, *problems]
        notes = (*equal, *note_on_buffers(stored.keys() - found.keys()))
    return Checkpoint(folder, "Hugging Face", found, tuple(problems), notes)


def plan_huggingface(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], max_shard_bytes: int
) -> Target:
    """Where every tensor goes in a folder of safetensors files of at most ``max_shard_bytes`` (more for a larger tensor)."""
    sizes = {name: torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in shapes.items()}
    shards = list(cut_into_shards(sizes.items(), max_shard_bytes))
    names = shard_names(len(shards))
    tensors: dict[str, StoredTensor] = {}
    parts: list[tuple[Path, int, bytes]] = []
    files: dict[Path, int] = {}
    for shard, file_name in zip(shards, names, strict=True):
        file = folder / file_name
        header = safetensors_header((name, dtypes[name], shapes[name]) for name in shard)
        parts.append((file, 0, header))
        offset = len(header)
        for name in shard:
            tensors[name] = whole(name, dtypes[name], shapes[name], file, offset)
            offset += sizes[name]
        files[file] = offset
    small = {}
    if len(shards) > 1:
        small[INDEX] = index_json(dict(zip(names, shards, strict=True)), sum(sizes.values())).encode()
    return Target(folder, {name: tensors[name] for name in shapes}, files, tuple(parts), small)


def safetensors_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The first bytes of a safetensors file: length, JSON, spaces up to a multiple of 8.

    >>> header = safetensors_header([("a", torch.bfloat16, (2, 3)), ("b", torch.float32, (1,))])
    >>> len(header) % 8, header[8:].rstrip().decode().partition(',"b":')[2]
    (0, '{"dtype":"F32","shape":[1],"data_offsets":[12,16]}}')
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
