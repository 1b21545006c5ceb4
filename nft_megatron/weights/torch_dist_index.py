"""The index of a ``torch_dist`` checkpoint (``.metadata``), read without running it: where tensors and objects are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nft_megatron.base.errors import UserError
from nft_megatron.base.inert_pickle import Record, read_pickle
from nft_megatron.base.untrusted import is_plain_name
from nft_megatron.weights.archive import DTYPE_NAMES

METADATA = ".metadata"
_MOST_BYTES = 1 << 28
"""Of an index: about a million chunks."""
_KNOWN: Mapping[str, Any] = {**DTYPE_NAMES, "torch.Size": tuple}
_OF_TORCH = "torch.distributed.checkpoint.metadata."


@dataclass(frozen=True, slots=True)
class Stored:
    """``num_bytes`` from byte ``start`` of ``file``, a name within the checkpoint's folder: one archive of ``torch.save``."""

    file: str
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """The box of a tensor from ``offsets``, ``sizes`` long, and where it is stored."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    stored: Stored


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A tensor of the whole model, in chunks."""

    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class TorchDistIndex:
    """Tensors and other objects by key."""

    tensors: Mapping[str, StoredKey]
    objects: Mapping[str, Stored]


def read_index(folder: Path, field: str) -> TorchDistIndex:
    """The index of the checkpoint in ``folder``. That the files hold what it says is not checked.

    Raises:
        UserError: naming ``field`` and the file if it is damaged or not such an index.
        OSError: if it cannot be read.
    """
    path = folder / METADATA
    if path.stat().st_size > _MOST_BYTES:
        raise UserError(field, path, f"has {path.stat().st_size} bytes", "copy or rewrite the checkpoint")
    data = path.read_bytes()
    try:
        return _index(read_pickle(data, _KNOWN))
    except Exception as error:  # a damaged file may raise anything, even MemoryError
        problem = f"is not the metadata of a torch_dist checkpoint ({error})"
        raise UserError(field, path, problem, "copy or rewrite the checkpoint") from error


def _index(content: Any) -> TorchDistIndex:
    state = _state(content, _OF_TORCH + "Metadata")
    places: dict[tuple[str, tuple[int, ...] | None], Stored] = {}
    for index, info in state["storage_data"].items():
        at = _state(index, _OF_TORCH + "MetadataIndex")
        offset = at.get("offset")
        places[_text(at["fqn"]), None if offset is None else _numbers(offset)] = _stored(info)
    tensors: dict[str, StoredKey] = {}
    objects: dict[str, Stored] = {}
    for key, value in state["state_dict_metadata"].items():
        if isinstance(value, Record) and value.name == _OF_TORCH + "BytesStorageMetadata":
            objects[_text(key)] = places[key, None]
            continue
        described = _state(value, _OF_TORCH + "TensorStorageMetadata")
        dtype, *_ = _state(described["properties"], _OF_TORCH + "TensorProperties", tuple)
        size = _numbers(described["size"])
        chunks = tuple(_chunk(chunk, key, size, places) for chunk in described["chunks"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{key} has no dtype")
        if sum(math.prod(chunk.sizes) for chunk in chunks) > math.prod(size):
            raise ValueError(f"the chunks of {key} overlap")
        tensors[_text(key)] = StoredKey(dtype, size, chunks)
    return TorchDistIndex(tensors, objects)


def _chunk(value: Any, key: str, size: tuple[int, ...], places: Mapping[tuple[str, tuple[int, ...] | None], Stored]) -> Chunk:
    state = _state(value, _OF_TORCH + "ChunkStorageMetadata")
    offsets, sizes = _numbers(state["offsets"]), _numbers(state["sizes"])
    ends = [offset + length for offset, length in zip(offsets, sizes, strict=True)]
    if any(end > whole for end, whole in zip(ends, size, strict=True)):
        raise ValueError(f"a chunk of {key} exceeds it")
    return Chunk(offsets, sizes, places[key, offsets])


def _stored(value: Any) -> Stored:
    state = _state(value, "torch.distributed.checkpoint.filesystem._StorageInfo")
    name = _text(state["relative_path"])
    if not is_plain_name(name):
        raise ValueError(f"the file {name!r} is not in its folder")
    if state.get("transform_descriptors"):
        raise ValueError(f"{name} is compressed")
    return Stored(name, *_numbers((state["offset"], state["length"])))


def _state(value: Any, name: str, kind: type = dict) -> Any:
    if not isinstance(value, Record) or value.name != name or not isinstance(value.state, kind):
        found = value.name if isinstance(value, Record) else type(value).__name__
        raise ValueError(f"{found} in place of {name.rpartition('.')[2]}")
    return value.state


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{type(value).__name__} in place of a name")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or not all(type(number) is int and 0 <= number < 1 << 62 for number in value):
        raise ValueError("a size or offset that is none")
    return value
