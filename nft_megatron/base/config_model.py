"""The base of every configuration section and of every algorithm."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from nft_megatron.base.paths import expand

PositiveFloat = Annotated[float, Field(gt=0, le=1e9)]
"""As seconds more than any timer needs, and less than some of them refuse."""
Count = Annotated[int, Field(ge=0, lt=2**31)]
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
ProcessCount = Annotated[int, Field(gt=0, le=4096)]
"""Processes or threads of one machine: each is started, and most are not."""


def _one_line(text: str) -> str:
    """``text`` without control characters, which would begin a new line in a script or a message, and end a path."""
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
        raise ValueError("has a control character, such as a line break, and must be one line")
    return text


def _expanded(value: Any) -> Any:
    if not isinstance(value, (str, Path)):
        return value
    if not _one_line(str(value)).strip():
        raise ValueError("is empty, which would mean the current folder")
    return expand(value)


def as_tuple(value: Any) -> Any:
    """A list, or a single value in place of one, as the tuple that a field of several values holds."""
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, (str, Path)) else value


Line = Annotated[str, AfterValidator(_one_line)]
LineList = Annotated[tuple[Line, ...], BeforeValidator(as_tuple)]
LoosePath = Annotated[Path, Field(strict=False), BeforeValidator(_expanded)]
"""A path, with ``~`` expanded: pyarrow does so by itself, pathlib and other programs do not."""


PathList = Annotated[tuple[LoosePath, ...], BeforeValidator(as_tuple)]
TextList = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]


class ConfigModel(BaseModel):
    """Frozen. Unknown keys and values of the wrong type are errors; a field's docstring is its help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False, defer_build=True
    )
