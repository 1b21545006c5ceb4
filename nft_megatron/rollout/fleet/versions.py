"""A version of the weights on its way to the servers: the check of its tensors, its fingerprint, and its files.

The files are safetensors with an index, ``WEIGHTS/version_000007/model-….safetensors``; they appear complete or not at all.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from nft_megatron.base.atomic_io import fsync_path, make_temporary_folder, publish_folder
from nft_megatron.base.errors import UserError
from nft_megatron.weights.fingerprint import combine_digests, tensor_bytes, tensor_digest
from nft_megatron.weights.hf_reader import DTYPES, INDEX
from nft_megatron.weights.hf_writer import cut_into_shards, index_json

_HASH_THREADS = 4
_REMEDY = "give the trainer's model and the servers' config.json the same architecture"
_FILE_DTYPES = {dtype: name for name, dtype in DTYPES.items()}
_VERSION = re.compile(r"version_(\d+)")


@dataclass(frozen=True)
class Published:
    """A version that servers can load: its number, fingerprint and size, and the folder of its files (None: no files)."""

    version: int
    fingerprint: str
    num_bytes: int
    folder: Path | None


class CheckedStream:
    """The trainer's stream, whose names and shapes are checked in passing; other threads compute the digests.

    Iterating raises ``UserError`` for an unexpected or repeated name or a wrong shape, and at the end for a missing name: vLLM
    itself would answer 200 and serve a mixture. Afterwards ``fingerprint`` and ``num_bytes`` are valid.
    """

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._tensors, self._missing = tensors, dict(shapes)
        self._digests: list[Future[str]] = []
        self._is_whole = False
        self.num_bytes = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        under_way: deque[Future[str]] = deque()
        with ThreadPoolExecutor(_HASH_THREADS) as hashers:
            for name, tensor in self._tensors:
                shape = self._missing.pop(name, None)
                if shape is None:
                    raise UserError("weights", name, "this tensor is repeated or not in the model", _REMEDY)
                if shape != tuple(tensor.shape):
                    raise UserError("weights", name, f"has shape {tuple(tensor.shape)}, not {shape}", _REMEDY)
                under_way.append(hashers.submit(tensor_digest, name, tensor))
                self.num_bytes += tensor.nbytes
                yield name, tensor
                if len(under_way) > _HASH_THREADS:  # so that no tensor is kept for long
                    self._digests.append(under_way.popleft())
                    self._digests[-1].result()
            self._digests += under_way
        if self._missing:
            raise UserError("weights", ", ".join(sorted(self._missing)), "missing from the stream", _REMEDY)
        self._is_whole = True

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the whole stream."""
        assert self._is_whole, "an incomplete stream has no fingerprint"
        return combine_digests(digest.result() for digest in self._digests)


class VersionWriter:
    """Writes one version: call ``add`` as tensors arrive, then ``publish``; ``discard`` leaves nothing behind.

    :meth:`write` cuts shards of up to ``shard_bytes``. A full shard is written and flushed on another thread while the next
    one fills.

    Raises:
        OSError: a file could not be written (disk full, no permission).
    """

    def __init__(self, root: Path, version: int, shard_bytes: int) -> None:
        self.folder = root / f"version_{version:06d}"
        self._temporary = make_temporary_folder(self.folder)
        self._shard_bytes = shard_bytes
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._shards: dict[str, list[str]] = {}
        self._num_bytes = 0

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Path:
        """Write the whole stream and publish the folder."""
        try:
            for shard in cut_into_shards(((item, item[1].nbytes) for item in tensors), self._shard_bytes):
                self.add(shard)
            return self.publish()
        except BaseException:
            self.discard()
            raise

    def add(self, shard: list[tuple[str, torch.Tensor]]) -> None:
        """Write one file. The caller must not change the tensors until the next call returns."""
        if self._writing is not None:
            self._writing.result()
        name = f"model-{len(self._shards) + 1:05d}.safetensors"
        self._shards[name] = [tensor_name for tensor_name, _ in shard]
        self._num_bytes += sum(tensor.nbytes for _, tensor in shard)
        self._writing = self._writer.submit(_write_safetensors, self._temporary / name, list(shard))
        shard.clear()

    def publish(self) -> Path:
        """Wait until everything is on disk, then rename the folder to its final name."""
        if self._writing is not None:
            self._writing.result()
        self._writer.shutdown()
        (self._temporary / INDEX).write_text(index_json(self._shards, self._num_bytes))
        fsync_path(self._temporary / INDEX)
        publish_folder(self._temporary, self.folder)
        return self.folder

    def discard(self) -> None:
        """Abandon the version and delete its files."""
        self._writer.shutdown()
        shutil.rmtree(self._temporary, ignore_errors=True)


def remove_versions(root: Path, keep: set[int]) -> None:
    """Delete the folders of all versions except ``keep``."""
    for folder in root.glob("version_*"):
        found = _VERSION.fullmatch(folder.name)
        if found and int(found[1]) not in keep:
            shutil.rmtree(folder, ignore_errors=True)


def _write_safetensors(path: Path, tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Write and flush one safetensors file without copying the tensors in memory."""
    header, end = {}, 0
    for name, tensor in tensors:
        header[name] = {
            "dtype": _FILE_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            rest = tensor_bytes(tensor)
            while rest:  # one call writes 2 GiB at most
                rest = rest[file.write(rest) :]
    fsync_path(path)
