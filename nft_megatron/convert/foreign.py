"""Checkpoints of other programs: a prefix of all names, and what is refused under its own name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from nft_megatron.base.errors import UserError
from nft_megatron.weights.torch_dist_index import METADATA

NOT_WEIGHTS = re.compile(r"(^|\.)optimizer\.|^rng_state|^rerun_state")
_OF_A_MODEL = re.compile(r"((?:[^.]+\.)*?)(embedding\.word_embeddings|decoder\.(layers|final_layernorm)|output_layer)\.")
_ADAPTER = re.compile(r"(^|\.)(adapters?|adapter_layer|lora_(A|B|embedding_[AB]|magnitude_vector))(\.|$)")
_HALF = re.compile(r"\.linear_fc1\.(weight|bias)\d*_[wv]$")
_HUGGING_FACE = re.compile(r"(^|\.)layers\.\d+\.self_attn\.[qkvo]_proj\.")

_MERGE = "merge the adapter into its base model with the program that trained it, and convert the merged model"
_EXPORT = "export it as a Hugging Face folder with the program that wrote it, and convert that folder if need be"
_UNSPLIT = "save it with singleton_local_shards false in the metadata for sharded_state_dict, which is Megatron's default"
_OF_FOLDERS = (
    (
        "model_world_size_*_rank_*.pt",
        "FSDP shards of verl",
        "merge them by `python -m verl.model_merger merge --backend fsdp`",
    ),
    ("*_model_states.pt", "DeepSpeed shards", _EXPORT),
    ("adapter_config.json", "a LoRA adapter of PEFT", _MERGE),
)


def shared_prefix(names: Iterable[str]) -> str:
    """What precedes the names of all of a model's parameters; empty if they do not share it.

    >>> shared_prefix(["module.decoder.layers.mlp.linear_fc2.weight", "module.output_layer.weight", "optimizer.state.x"])
    'module.'
    >>> shared_prefix(["ema.output_layer.weight", "output_layer.weight"])
    ''
    """
    found = {match[1] for name in names if not NOT_WEIGHTS.search(name) and (match := _OF_A_MODEL.match(name))}
    return found.pop() if len(found) == 1 else ""


def note_on_prefix(prefix: str) -> tuple[str, ...]:
    """At most one line for the user: which prefix is left out."""
    return (f"the names of all parameters begin with {prefix!r}, which is left out",) if prefix else ()


def refuse_names(names: Iterable[str], place: Path, field: str) -> None:
    """Raise :class:`UserError` if the names stored in ``place`` are an adapter's, halves of weights, or not Megatron's.

    >>> refuse_names(["decoder.layers.mlp.linear_fc1.adapter.linear_in.weight"], Path("iter_0000001"), "SRC")
    Traceback (most recent call last):
    nft_megatron.base.errors.UserError: SRC = iter_0000001: holds a LoRA adapter (decoder.layers.mlp.linear_fc1.ada...
    """
    names = [name for name in names if not NOT_WEIGHTS.search(name)]
    # Both keep gate and up apart: Megatron-FSDP, which writes no metadata.json (transformer/fsdp_dtensor_checkpoint.py), and
    # dist_checkpointing where it is told to (transformer/mlp.py).
    is_fsdp = (place / METADATA).is_file() and not (place / "metadata.json").is_file()
    split = ("Megatron-FSDP shards", _EXPORT) if is_fsdp else ("gate and up apart, as _w and _v", _UNSPLIT)
    for pattern, what, remedy in (
        (_ADAPTER, "a LoRA adapter", _MERGE),
        (_HALF, *split),
        (_HUGGING_FACE, "FSDP shards under Hugging Face names", _EXPORT),
    ):
        if found := min(filter(pattern.search, names), default=None):
            raise UserError(field, place, f"holds {what} ({found})", remedy)


def refuse_folder(folder: Path, field: str) -> None:
    """Raise :class:`UserError` if the files of ``folder``, which holds no weights that can be read, say whose it is."""
    for pattern, what, remedy in _OF_FOLDERS:
        if found := min(folder.glob(pattern), default=None):
            raise UserError(field, folder, f"holds {what} ({found.name})", remedy)
