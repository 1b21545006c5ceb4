"""A Hugging Face model folder from a stream of named tensors: sharded safetensors, index, config, tokenizer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from nft_megatron.weights.hf_reader import INDEX, SINGLE

T = TypeVar("T")

MAX_SHARD_BYTES = 5_000_000_000

_MODEL_FILES = ("config.json", "generation_config.json", "LICENSE")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model", "tekken.json")
_TOKENIZER_FILES = (
    *_VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def write_hf_folder(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], source: Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write ``tensors`` into the existing ``folder`` with the configuration and tokenizer files of ``source``.

    Holds one shard in memory at a time. One shard becomes ``model.safetensors``, several get an index.

    Raises:
        OSError: a file could not be written (disk full, no permission); it names ``folder``.
    """
    with _writing(folder):
        copy_model_files(source, folder)
    shards: list[list[str]] = []
    total_bytes, dtype = 0, torch.float32
    sized = ((item, item[1].nbytes) for item in tensors)
    for shard in cut_into_shards(sized, max_shard_bytes):
        with _writing(folder):
            save_file(
                {name: tensor.contiguous().cpu() for name, tensor in shard},
                folder / f"shard-{len(shards)}",
                metadata={"format": "pt"},
            )
        shards.append([name for name, _ in shard])
        total_bytes += sum(tensor.nbytes for _, tensor in shard)
        dtype = shard[-1][1].dtype
        shard.clear()  # before the next one fills
    with _writing(folder):
        names = shard_names(len(shards))  # each name contains their number
        for number, name in enumerate(names):
            (folder / f"shard-{number}").rename(folder / name)
        if len(shards) > 1:
            (folder / INDEX).write_text(index_json(dict(zip(names, shards, strict=True)), total_bytes))
        state_dtype(folder / "config.json", str(dtype).removeprefix("torch."))


def copy_model_files(source: Path, folder: Path, tokenizer: Path | None = None) -> None:
    """Copy the configuration files that ``source`` has, and the tokenizer's that ``tokenizer`` has, by default ``source`` too.

    Byte for byte: a tokenizer rewritten by one major version of transformers does not load in the other.
    """
    for origin, names in ((source, _MODEL_FILES), (tokenizer or source, _TOKENIZER_FILES)):
        for name in names:
            if (origin / name).is_file():
                shutil.copyfile(origin / name, folder / name)


def has_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` holds a tokenizer's vocabulary."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def cut_into_shards(sized: Iterable[tuple[T, int]], max_shard_bytes: int) -> Iterator[list[T]]:
    """Group items by size, in order; an item larger than a shard gets its own.

    >>> list(cut_into_shards([("a", 4), ("b", 4), ("c", 20), ("d", 1)], max_shard_bytes=8))
    [['a', 'b'], ['c'], ['d']]
    """
    shard: list[T] = []
    num_bytes = 0
    for item, size in sized:
        if shard and num_bytes + size > max_shard_bytes:
            yield shard
            shard, num_bytes = [], 0
        shard.append(item)
        num_bytes += size
    if shard:
        yield shard


def shard_names(num_shards: int) -> list[str]:
    """File names as transformers writes them.

    >>> shard_names(1), shard_names(2)
    (['model.safetensors'], ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'])
    """
    if num_shards == 1:
        return [SINGLE]
    return [f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors" for number in range(num_shards)]


def index_json(shards: Mapping[str, Sequence[str]], total_bytes: int) -> str:
    """The content of ``model.safetensors.index.json`` for the tensor names in each file."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    return json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=2)


def state_dtype(path: Path, dtype: str) -> None:
    """Set config.json's dtype to that of the weights (transformers loads in it)."""
    config = json.loads(path.read_text())
    field = "torch_dtype" if "torch_dtype" in config else "dtype"  # transformers 4 and 5
    if config.get(field) != dtype:
        path.write_text(json.dumps(config | {field: dtype}, indent=2) + "\n")


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Report what could not be written. safetensors wraps a full disk in its own error, "… (os error 28)"."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reported = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else reported and int(reported[1])
        if number is None:
            raise
        raise OSError(number, f"{os.strerror(number)} while writing an export", str(folder)) from error
