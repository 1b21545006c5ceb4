"""Algorithms by name. A new one is a file here with a subclass of :class:`Algorithm`; docs/new_algorithm.md shows one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from nft_megatron.algorithms.algorithm import (
    Algorithm,
    AnswerBatch,
    Coupling,
    TokenBatch,
    TokenLoss,
)
from nft_megatron.base.errors import UserError

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AnswerBatch",
    "Coupling",
    "TokenBatch",
    "TokenLoss",
    "build_algorithm",
]


def _found() -> dict[str, type[Algorithm]]:
    """The classes in this folder's files that define their own ``name``, each once, in file order."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    named = [each for each in classes if issubclass(each, Algorithm) and not each.model_fields["name"].is_required()]
    return {each.model_fields["name"].default: each for each in named}


ALGORITHMS: Mapping[str, type[Algorithm]] = MappingProxyType(_found())


def build_algorithm(name: str, **options: Any) -> Algorithm:
    """The algorithm of that name with these options.

    Raises:
        UserError: no such name. A :class:`ValueError` of pydantic's names a wrong option.

    >>> build_algorithm("infonca", beta=0.5)
    InfoNCA(name='infonca', beta=0.5, sft_weight=0.1)
    >>> build_algorithm("ntf")
    Traceback (most recent call last):
    nft_megatron.base.errors.UserError: algorithm.name = ntf: no such algorithm; one of infonca, nft, rft, grpo, dr_grpo, dapo
    """
    if name not in ALGORITHMS:
        raise UserError("algorithm.name", name, "no such algorithm", f"one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name](**options)
