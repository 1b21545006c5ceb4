"""A Hugging Face model folder from a stream of named tensors: sharded safetensors, index, config, tokenizer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

MAX_SHARD_BYTES = 5_000_000_000

_COPIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "LICENSE",
)  # fmt: skip
"""Byte for byte: a tokenizer rewritten by one major version of transformers does not load in the other."""


def write_hf_folder(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], source: Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write ``tensors`` into ``folder`` (which exists) with the configuration and tokenizer files of ``source``.

    Holds one shard in memory at a time. One shard becomes ``model.safetensors``, several get an index.

    Raises:
        OSError: a file could not be written (disk full, no permission); it names ``folder``.
    """
    with _writing(folder):
        for name in _COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = pending_bytes = 0

    def write_pending() -> None:
        with _writing(folder):
            save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
            write_pending()
            pending_bytes = 0
        pending[name] = tensor.contiguous().cpu()
        pending_bytes += tensor.nbytes
        total += tensor.nbytes
    write_pending()
    with _writing(folder):
        _name_shards(folder, shards, total)
        _state_dtype(folder / "config.json", str(tensor.dtype).removeprefix("torch."))


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Tell what could not be written. safetensors reports a full disk as an error of its own, "… (os error 28)"."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reported = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else reported and int(reported[1])
        if number is None:
            raise
        raise OSError(number, f"{os.strerror(number)} while writing an export", str(folder)) from error


def _state_dtype(path: Path, dtype: str) -> None:
    """Where the weights were trained in another dtype than the source's, config.json says so (transformers loads in it)."""
    config = json.loads(path.read_text())
    field = "torch_dtype" if "torch_dtype" in config else "dtype"  # transformers 4 and 5
    if config.get(field) != dtype:
        path.write_text(json.dumps(config | {field: dtype}, indent=2) + "\n")


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    """The number of shards is known only now, and stands in each one's name."""
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        shard = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
