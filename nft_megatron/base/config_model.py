"""The base of every configuration section and of every algorithm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

PositiveFloat = Annotated[float, Field(gt=0)]
LoosePath = Annotated[Path, Field(strict=False)]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, (str, Path)) else value


PathList = Annotated[tuple[LoosePath, ...], BeforeValidator(_as_tuple)]
TextList = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class ConfigModel(BaseModel):
    """Frozen. Unknown keys and values of the wrong type are errors; a field's docstring is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)
