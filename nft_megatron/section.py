"""A group of configuration fields: the base of every section in ``config.py`` and of every algorithm."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveFloat = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Frozen. Unknown keys and values of the wrong type are errors; a field's docstring is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)
