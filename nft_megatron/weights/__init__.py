"""Weight layouts, one file per model family: how Hugging Face tensors and Megatron-Core parameters correspond.

A new family is a file with ``ARCHITECTURE``, ``shape(config)``, ``table(shape)`` and ``hf_config(shape)``, and its name in
``FAMILIES``; docs/new_model_family.md shows one line by line.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from nft_megatron.base.errors import UserError
from nft_megatron.base.paths import check_model_folder
from nft_megatron.base.untrusted import read_json_object
from nft_megatron.weights import llama, mistral, qwen2, qwen3, qwen3_moe
from nft_megatron.weights.shape import ModelShape
from nft_megatron.weights.table import WeightTable

FAMILIES: dict[str, ModuleType] = {family.ARCHITECTURE: family for family in (qwen2, qwen3, qwen3_moe, llama, mistral)}

__all__ = ["FAMILIES", "ModelShape", "WeightTable", "hf_config", "num_parameters", "read_shape", "shape_of", "weight_table"]


def read_shape(folder: Path | str, field: str = "model.path") -> ModelShape:
    """The sizes of the model in a Hugging Face folder.

    Raises:
        UserError: naming ``field`` when the folder or its ``config.json`` is missing or unreadable; naming the entry of
            ``config.json`` when no family here can express it.
    """
    folder = Path(folder)
    check_model_folder(folder, field)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(field, folder, "has no config.json", "give the path of a complete Hugging Face model folder")
    return shape_of(read_json_object(path, field, "copy the model folder again"))


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a parsed ``config.json``.

    Raises:
        UserError: naming the entry that is malformed, or that no family here can express.
    """
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else architectures
    return _family("config.json: architectures", first).shape(config)


def weight_table(shape: ModelShape) -> WeightTable:
    """The table of the family that ``shape`` belongs to."""
    return FAMILIES[shape.architecture].table(shape)


@functools.lru_cache(maxsize=16)
def num_parameters(shape: ModelShape) -> int:
    """Parameters of the model; a tied LM head counts once."""
    return sum(math.prod(size) for size in weight_table(shape).shapes.values())


def hf_config(shape: ModelShape) -> dict[str, Any]:
    """A ``config.json`` for a model that never had one; :func:`shape_of` reads ``shape`` back from it.

    Ids of special tokens are null and the dtype is absent: they belong to the tokenizer and to the weights.

    Raises:
        UserError: naming the field of ``shape`` that the family's ``config.json`` cannot express.
    """
    config = _family("architecture", shape.architecture).hf_config(shape)
    read = shape_of(config)
    for field in fields(ModelShape):
        value = getattr(shape, field.name)
        if getattr(read, field.name) != value:
            raise UserError(
                field.name, value, f"{shape.architecture} is always {getattr(read, field.name)}", "name another family"
            )
    return config


def _family(field: str, architecture: object) -> ModuleType:
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise UserError(field, architecture, "no such model family", f"use one of {', '.join(FAMILIES)}")
    return FAMILIES[architecture]
