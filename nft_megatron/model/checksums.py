"""Checksums of a checkpoint's files. Megatron-Core silently loads a file with a flipped bit."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch.distributed as dist

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.errors import UserError
from nft_megatron.base.untrusted import is_plain_name, read_json_object
from nft_megatron.model.control import on_main, together
from nft_megatron.model.topology import Topology

_FILE = "checksums.json"
_REMEDY = "resume from an older checkpoint: write its name into checkpoints/latest"
_BLOCK = 1 << 22


class DamagedCheckpointError(UserError):
    """A checkpoint differs from what was written. An older one may serve."""


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _content(path: Path) -> bytearray:
    content = bytearray(path.stat().st_size)
    with path.open("rb", buffering=0) as file:
        view = memoryview(content)
        while num_bytes := file.readinto(view[:_BLOCK]):
            view = view[num_bytes:]
    return content if not view else content[: -len(view)]


def write_checksums(folder: Path, topology: Topology) -> None:
    """Write ``checksums.json`` over all files in ``folder``. Every rank reads back its own files, rank 0 the common ones."""
    own = [path for path in folder.iterdir() if path.name.startswith(f"__{topology.rank}_")]
    if topology.is_main:
        own += [path for path in folder.iterdir() if not path.name.startswith("__")]
    checksums = together(topology, lambda: {path.name: _crc32(path) for path in own})
    of_ranks: list[dict[str, int]] = [{} for _ in range(topology.world_size)]
    dist.all_gather_object(of_ranks, checksums, group=topology.control_group)

    def write() -> None:
        with atomic_file(folder / _FILE) as temporary:
            temporary.write_text(json.dumps({name: value for part in of_ranks for name, value in part.items()}, indent=1))

    on_main(topology, write)


def verify_checksums(folder: Path, topology: Topology) -> dict[str, bytearray]:
    """Read every file once in the world and compare. A collective.

    Returns what this rank has read, by the file's name: first of all the file that it wrote if this run has the layout that
    wrote it. Other files are dealt out.

    Raises:
        DamagedCheckpointError: on every rank, if the folder is incomplete or a file differs from what was written.
    """

    def verify() -> dict[str, bytearray]:
        if not (folder / _FILE).is_file():
            raise DamagedCheckpointError("checkpoint", folder, f"is not a complete checkpoint (no {_FILE})", _REMEDY)
        try:
            checksums = read_json_object(folder / _FILE, "checkpoint", _REMEDY)
        except UserError as error:
            raise DamagedCheckpointError(error.field, error.value, error.problem, error.remedy) from error
        contents = {}
        for name in sorted(checksums):
            if _writer(name) % topology.world_size != topology.rank:
                continue
            if not is_plain_name(name) or not (folder / name).is_file():
                raise DamagedCheckpointError("checkpoint", folder, f"lacks its file {name}", _REMEDY)
            contents[name] = _content(folder / name)
            if zlib.crc32(contents[name]) != checksums[name]:
                problem = f"{name} is damaged: it does not match its recorded checksum"
                raise DamagedCheckpointError("checkpoint", folder, problem, _REMEDY)
        return contents

    return together(topology, verify)


def _writer(name: str) -> int:
    """The rank that wrote a file.

    >>> _writer("__12_0.distcp"), _writer("common.pt"), _writer("__x")
    (12, 0, 0)
    """
    rank = name.removeprefix("__").partition("_")[0] if name.startswith("__") else ""
    return int(rank) if rank.isdecimal() else 0
