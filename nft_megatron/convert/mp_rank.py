"""Megatron's older checkpoints, one file per rank: ``mp_rank_01_002/model_optim_rng.pt`` for tensor rank 1, pipeline rank 2.

Each file is one archive of ``torch.save`` with the model's state under ``model`` (``model0``, ``model1`` … with an interleaved
pipeline) among other things. Names are Megatron-Core's, with layers numbered within the file; only the positions of tensors are
read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nft_megatron.base.errors import UserError
from nft_megatron.convert.blocks import Block, Box, StoredTensor, covers, matrix, source_blocks
from nft_megatron.convert.checkpoint import Checkpoint, Problem, compare_copies, compare_with_table
from nft_megatron.convert.foreign import note_on_prefix, refuse_names, shared_prefix
from nft_megatron.weights.archive import TensorAt, read_archive
from nft_megatron.weights.decoder import fused_name
from nft_megatron.weights.table import Entry, Layout, WeightTable, is_buffer, note_on_buffers

_FOLDER = re.compile(r"^mp_rank_(\d{2})(?:_(\d{3}))?$")
_FILE = "model_optim_rng.pt"
_CHUNK = re.compile(r"^model(\d*)$")
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_REMEDY = "copy the checkpoint again"
_SECOND = " of a later stage"
"""Added to a name that an earlier stage has too: the last one has its own copy of a tied embedding."""


def is_mp_rank(folder: Path) -> bool:
    """Whether ``folder`` is the ``iter_…`` folder of such a checkpoint."""
    return any(path.name.startswith("mp_rank_") and path.is_dir() for path in folder.iterdir())


def open_mp_rank(folder: Path, table: WeightTable, field: str) -> Checkpoint:
    """The weights of a checkpoint of any tensor and pipeline size; experts over several ranks are not supported.

    Raises:
        UserError: naming ``field`` for files that are missing, truncated, unreadable or of another format.
    """
    ranks: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("mp_rank_"):
            match = _FOLDER.match(path.name)
            if match is None or not (path / _FILE).is_file():
                raise UserError(
                    field, path, f"is not the folder of one tensor and pipeline rank with a {_FILE}", "save as torch_dist"
                )
            ranks[int(match[1]), int(match[2] or 0)] = path / _FILE
    tensor_size, pipeline_size = (1 + max(rank[axis] for rank in ranks) for axis in (0, 1))
    if len(ranks) != tensor_size * pipeline_size:
        raise UserError(
            field, folder, f"has {len(ranks)} of the {tensor_size} x {pipeline_size} folders mp_rank_XX_YYY", _REMEDY
        )
    has_experts = any(entry.expert is not None for entry in table.entries)
    prefixes: set[str] = set()
    shards = [
        _read_tensor_rank([ranks[rank, stage] for stage in range(pipeline_size)], has_experts, prefixes, field)
        for rank in range(tensor_size)
    ]
    found: dict[str, StoredTensor] = {}
    copies: dict[str, tuple[StoredTensor, str]] = {}
    problems: list[Problem] = []
    used: set[str] = set()
    for entry in table.entries:
        second = entry.name + _SECOND
        used |= {entry.name, second}
        if entry.exported and all(entry.name in shard for shard in shards):
            found |= _read_entry(entry, [shard[entry.name] for shard in shards], problems)
        for name in (second,) if entry.exported else (entry.name, second):
            if all(name in shard for shard in shards):
                for source, tensor in _read_entry(entry, [shard[name] for shard in shards], problems).items():
                    copies[name] = tensor, source
    for name in sorted(name for name in shards[0].keys() - used if not is_buffer(name)):
        problems.append(Problem("unexpected", name, f"is in {folder} but not in the model that config.json describes"))
    tensors, of_table = compare_with_table(found, table, folder)
    reported = {problem.name for problem in problems}
    problems += [problem for problem in of_table if problem.name not in reported]
    differing, equal = compare_copies(copies, tensors, field)
    of_prefixes = (note for prefix in sorted(prefixes) for note in note_on_prefix(prefix))
    notes = (*of_prefixes, *equal, *note_on_buffers(shards[0].keys()))
    return Checkpoint(folder, "mp_rank", tensors, (*differing, *problems), notes)


def _read_tensor_rank(stages: list[Path], has_experts: bool, prefixes: set[str], field: str) -> dict[str, TensorAt]:
    """The parameters of one tensor rank over all pipeline stages, with layers numbered across the whole model.

    A prefix of all names is left out and added to ``prefixes``.
    """
    by_chunk: dict[tuple[int, int], Mapping[str, Any]] = {}  # in the model's order: interleaved chunk, then stage
    for stage, path in enumerate(stages):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            content = read_archive(path, descriptor, 0, path.stat().st_size, field)
        finally:
            os.close(descriptor)
        chunks = (
            {match[1]: key for key in content if isinstance(key, str) and (match := _CHUNK.match(key))}
            if isinstance(content, dict)
            else {}
        )
        if not chunks or not all(isinstance(content[key], dict) for key in chunks.values()):
            raise UserError(field, path, "has no state under 'model'", "give a checkpoint of Megatron-Core")
        for number, key in chunks.items():
            named = {name: tensor for name, tensor in content[key].items() if isinstance(name, str)}
            refuse_names(named, path, field)
            prefix = shared_prefix(named)
            prefixes.add(prefix)
            by_chunk[int(number or 0), stage] = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    parameters: dict[str, TensorAt] = {}
    num_layers = 0
    for _, chunk in sorted(by_chunk.items()):
        first, local = num_layers, 0
        for name, tensor in chunk.items():
            if not isinstance(tensor, TensorAt) or name.endswith("_extra_state"):
                continue
            if of_layer := _LAYER.match(name):
                name = fused_name(f"decoder.layers.{first + int(of_layer[1])}.{of_layer[2]}", has_experts)
                local = max(local, int(of_layer[1]) + 1)
            parameters[name if name not in parameters else name + _SECOND] = tensor
        num_layers += local
    return parameters


def _read_entry(entry: Entry, shards: list[TensorAt], problems: list[Problem]) -> dict[str, StoredTensor]:
    """The Hugging Face tensors of one parameter from all tensor ranks."""
    shards = shards[:1] if entry.layout is Layout.WHOLE else shards
    dtype, padded_vocab = shards[0].dtype, shards[0].shape[entry.axis] * len(shards)
    file = shards[0].checksum.file
    blocks_of: list[list[Block]] = [[] for _ in entry.sources]
    for rank, shard in enumerate(shards):
        expected = entry.local_shape(len(shards), padded_vocab)
        if shard.shape != expected or shard.dtype != dtype:
            text = f"{entry.name} has shape {list(shard.shape)} and {shard.dtype} in {shard.checksum.file}"
            text += f", expected {list(expected)} and {dtype}"
            problems.append(Problem("shape" if shard.dtype == dtype else "dtype", entry.sources[0], text))
            return {}
        rows, columns = matrix(shard.shape)
        box = Box(shard.checksum.file, shard.offset, 0, rows, 0, columns)
        pieces = entry.pieces(len(shards), rank, padded_vocab)
        for blocks, more in zip(blocks_of, source_blocks(entry, pieces, [box], dtype.itemsize), strict=True):
            blocks.extend(more)
    checksums = tuple(shard.checksum for shard in shards if shard.checksum.crc32)
    tensors = {}
    for name, shape, blocks in zip(entry.sources, entry.shapes, blocks_of, strict=True):
        rows, columns = matrix(shape)
        if covers(blocks, rows * columns * dtype.itemsize):
            ordered = tuple(sorted(blocks, key=lambda block: (block.row, block.column)))
            tensors[name] = StoredTensor(name, dtype, shape, ordered, checksums)
        else:
            problems.append(Problem("shape", name, f"is only partly stored in {file.parents[1]}"))
    return tensors
