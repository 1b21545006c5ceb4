"""Weight layouts, one file a model family: how Hugging Face tensors and Megatron-Core parameters correspond.

A new family is a file with ``ARCHITECTURE``, ``shape(config)`` and ``table(shape)``, and one line in ``FAMILIES``.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

from nft_megatron.errors import UserError
from nft_megatron.weights import qwen2
from nft_megatron.weights.shape import ModelShape
from nft_megatron.weights.table import WeightTable

FAMILIES: dict[str, ModuleType] = {qwen2.ARCHITECTURE: qwen2}

__all__ = ["FAMILIES", "ModelShape", "WeightTable", "read_shape", "weight_table"]


def read_shape(folder: Path | str, field: str = "model.path") -> ModelShape:
    """The sizes of the model in a Hugging Face folder.

    Raises:
        UserError: naming ``field`` when the folder or its ``config.json`` is missing or unreadable; naming the entry of
            ``config.json`` when it asks for something that no family here can express.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(field, folder, "no such folder", "give the path of a Hugging Face model folder")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(field, folder, "has no config.json", "give the path of a complete Hugging Face model folder")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(field, path, f"is not JSON ({error})", "copy the model folder again") from error
    architectures = config.get("architectures") or []
    family = FAMILIES.get(architectures[0]) if architectures else None
    if family is None:
        known = ", ".join(FAMILIES)
        raise UserError(f"{path}: architectures", architectures, "no such model family here", f"use one of {known}")
    return family.shape(config)


def weight_table(shape: ModelShape) -> WeightTable:
    """The table of the family that ``shape`` belongs to."""
    return FAMILIES[shape.architecture].table(shape)
