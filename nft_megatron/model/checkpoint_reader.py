"""Reads the files of a ``torch_dist`` checkpoint for Megatron-Core without pickle and without ``torch.load``.

A run folder may have been copied from somebody else. Megatron-Core and torch would execute whatever its pickles say: the index
(torch/distributed/checkpoint/filesystem.py:930) and every object that is no tensor (default_planner.py:387, with
``weights_only=False``); Transformer Engine unpickles the ``_extra_state`` of its modules. So all of them are read here, as
plain data and tensors, and what Megatron-Core gets is built from that.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensor, StateDict
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, Metadata, load_state_dict
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem
from torch.futures import Future

from nft_megatron.base.errors import UserError
from nft_megatron.base.inert_pickle import UnreadablePickle, read_pickle
from nft_megatron.base.untrusted import read_json_object
from nft_megatron.model.megatron import load_through
from nft_megatron.weights.archive import Source, load_archive, load_file
from nft_megatron.weights.torch_dist_index import TorchDistIndex, read_index

REMEDY = "resume from an older checkpoint: write its name into checkpoints/latest"


class StoredCheckpoint:
    """A checkpoint whose index and common part have been read. ``contents``: files that have been read already, by name.

    Raises:
        UserError: if one of them is damaged, or more than plain data and tensors.
    """

    def __init__(self, folder: Path, contents: Mapping[str, bytearray] | None = None) -> None:
        self.folder, self.contents = folder, contents or {}
        config = read_json_object(folder / "metadata.json", "checkpoint", REMEDY)
        if config.get("sharded_backend") != "torch_dist":  # the other fields differ between versions of Megatron-Core
            raise UserError("checkpoint", folder / "metadata.json", "is not Megatron-Core's: no backend torch_dist", REMEDY)
        self.common = load_file(folder / "common.pt", "checkpoint")
        self.metadata = _metadata(read_index(folder, "checkpoint"))
        if not isinstance(self.common, dict):
            raise UserError("checkpoint", folder / "common.pt", "holds no state", REMEDY)

    def load(self, state: ShardedStateDict) -> StateDict:
        """``dist_checkpointing.load``, reading through here. Keys that the checkpoint lacks raise."""
        return load_through(state, str(self.folder), _Sharded(self), self.common)


def _metadata(index: TorchDistIndex) -> Metadata:
    """The index in torch's own classes."""
    keys: dict[str, Any] = {key: BytesStorageMetadata() for key in index.objects}
    storage = {
        MetadataIndex(key): _StorageInfo(stored.file, stored.start, stored.num_bytes) for key, stored in index.objects.items()
    }
    for key, tensor in index.tensors.items():
        chunks = []
        for number, chunk in enumerate(tensor.chunks):
            offsets, stored = torch.Size(chunk.offsets), chunk.stored
            chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)))
            storage[MetadataIndex(key, offsets, number)] = _StorageInfo(stored.file, stored.start, stored.num_bytes)
        keys[key] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(tensor.size), chunks)
    return Metadata(keys, storage_data=storage, storage_meta=StorageMeta())


class _Sharded(TorchDistLoadShardedStrategy):
    """Megatron-Core's strategy with another reader and planner (dist_checkpointing/strategies/torch.py:770)."""

    def __init__(self, stored: StoredCheckpoint) -> None:
        super().__init__()
        self._stored = stored

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path, *_: Any) -> StateDict:
        tensors = [shard for shard in nested_values(sharded_state_dict) if isinstance(shard, ShardedTensor)]
        by_key, flat, renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state = mcore_to_pyt_state_dict(by_key, True)
        planner = _Planner(
            shapes_validation_sharded_tensors=[tensor for tensor in tensors if not tensor.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={tensor.key: tensor for tensor in tensors if tensor.allow_shape_mismatch},
        )
        load_state_dict(state, _Reader(self._stored), planner=planner)
        unwrapped = {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        result = _replace_sharded_keys_with_state_dict_keys(unwrapped, flat, renamed)
        _restore_dict_types(result, sharded_state_dict)
        return result

    def load_sharded_metadata(self, checkpoint_dir: Path) -> ShardedStateDict:
        metadata = self._stored.metadata
        found = [
            ShardedObject.empty_from_unique_key(key)
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, BytesStorageMetadata)
        ]
        return {each.unique_key: each for each in found} | self.load_tensors_metadata(checkpoint_dir, metadata)


class _Planner(MCoreLoadPlanner):
    def take_object(self, item: ReadItem, value: Any) -> None:
        """What ``load_bytes`` does with what it has unpickled."""
        set_element(self.original_state_dict, self.mappings[item.dest_index.fqn], value)


class _Reader(FileSystemReader):
    def __init__(self, stored: StoredCheckpoint) -> None:
        super().__init__(stored.folder)
        self._folder, self._metadata, self._contents = stored.folder, stored.metadata, stored.contents

    def read_metadata(self) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        assert isinstance(planner, _Planner)
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self.storage_data[item.storage_index].relative_path].append(item)
        for name, items in by_file.items():
            path = self._folder / name
            with ExitStack() as stack:
                source: Source | None = self._contents.get(name)
                if source is None:
                    source = os.open(path, os.O_RDONLY)
                    stack.callback(os.close, source)
                for item in items:
                    self._read_item(item, planner, path, source)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_item(self, item: ReadItem, planner: _Planner, path: Path, source: Source) -> None:
        key, place = item.storage_index.fqn, self.storage_data[item.storage_index]
        size = os.fstat(source).st_size if isinstance(source, int) else len(source)
        if place.offset + place.length > size:
            raise UserError("checkpoint", path, f"is truncated within {key}", REMEDY)
        value = load_archive(path, source, place.offset, place.length, "checkpoint")
        if item.type == LoadItemType.BYTE_IO:
            if "_extra_state" in key and not (isinstance(value, list) and all(map(_is_empty_state, value))):
                raise UserError("checkpoint", path, f"{key} is more than an empty state of Transformer Engine", REMEDY)
            planner.take_object(item, value)
            return
        if not isinstance(value, torch.Tensor):
            raise UserError("checkpoint", path, f"holds no tensor for {key}", REMEDY)
        part = narrow_tensor_by_index(value, item.storage_offsets, item.lengths)
        target = planner.resolve_tensor(item).detach()
        if target.size() != part.size():
            raise UserError("checkpoint", path, f"{key} has shape {list(value.shape)}, unlike its index", REMEDY)
        target.copy_(part)
        planner.commit_tensor(item, target)


def _is_empty_state(value: Any) -> bool:
    """Whether it is what a module without 8-bit training saves: None, nothing, or a pickled None (Transformer Engine 2.0)."""
    if isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.numel() < 1024:
        try:
            return value.numel() == 0 or read_pickle(bytes(value.tolist()), {}, refuse_others=True) is None
        except UnreadablePickle:
            return False
    return value is None
