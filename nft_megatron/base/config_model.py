"""The base of every configuration section and of every algorithm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from nft_megatron.base.paths import expand

PositiveFloat = Annotated[float, Field(gt=0)]


def _expanded(value: Any) -> Any:
    return expand(value) if isinstance(value, (str, Path)) else value


LoosePath = Annotated[Path, Field(strict=False), BeforeValidator(_expanded)]
"""A path, with ``~`` expanded: pyarrow does so by itself, pathlib and other programs do not."""


def as_tuple(value: Any) -> Any:
    """A list, or a single value in place of one, as the tuple that a field of several values holds."""
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, (str, Path)) else value


PathList = Annotated[tuple[LoosePath, ...], BeforeValidator(as_tuple)]
TextList = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]


class ConfigModel(BaseModel):
    """Frozen. Unknown keys and values of the wrong type are errors; a field's docstring is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False, defer_build=True)
