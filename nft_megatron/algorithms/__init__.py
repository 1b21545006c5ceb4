"""Algorithms by name: those of this folder, and a user's own by its import path. docs/new_algorithm.md shows one."""

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
from nft_megatron.base.imported import import_object, is_import_path

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AnswerBatch",
    "Coupling",
    "TokenBatch",
    "TokenLoss",
    "build_algorithm",
    "imported_algorithm",
]


def _found() -> dict[str, type[Algorithm]]:
    """The classes in this folder's files that define their own ``name``, each once, in file order."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    named = [each for each in classes if issubclass(each, Algorithm) and not each.model_fields["name"].is_required()]
    return {each.model_fields["name"].default: each for each in named}


ALGORITHMS: Mapping[str, type[Algorithm]] = MappingProxyType(_found())


def build_algorithm(name: str, **options: Any) -> Algorithm:
    """The algorithm of that name, or at that import path, with these options.

    Raises:
        UserError: no such name, or no algorithm there. A :class:`ValueError` of pydantic's names a wrong option.

    >>> build_algorithm("infonca", beta=0.5)
    InfoNCA(name='infonca', beta=0.5, sft_weight=0.1)
    >>> build_algorithm("ntf")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    nft_megatron.base.errors.UserError: algorithm.name = ntf: no such algorithm; one of cispo, gspo, infonca, nft, rft, ...
    """
    if is_import_path(name):
        return imported_algorithm(name, options)
    if name not in ALGORITHMS:
        raise UserError("algorithm.name", name, "no such algorithm", f"one of {', '.join(ALGORITHMS)}, or module:Class")
    return ALGORITHMS[name](**options)


def imported_algorithm(path: str, options: Mapping[str, Any]) -> Algorithm:
    """An instance of a user's class, named by its import path as ``my_package.my_module:MyLoss``. Its ``name`` is that path.

    Raises:
        UserError: it cannot be imported, is no algorithm, or lacks its loss. A :class:`ValueError` of pydantic's names a wrong
            option.
    """
    found = import_object(path, "algorithm.name")
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise UserError("algorithm.name", path, "is no subclass of nft_megatron.algorithms.Algorithm", "derive it from that")
    if not found.model_fields["name"].is_required():
        raise UserError("algorithm.name", path, "is a class with a name of its own", "leave `name` out of the class")
    algorithm = found.model_validate({**options, "name": path})
    if algorithm.coupling not in ("token", "sequence", "group"):
        raise UserError("algorithm.name", path, f"has coupling {algorithm.coupling!r}", "use token, sequence or group")
    loss = "token_loss" if algorithm.coupling == "token" else "sequence_loss"
    if getattr(found, loss) is getattr(Algorithm, loss):
        problem = f"has coupling {algorithm.coupling!r} but no {loss}"
        raise UserError("algorithm.name", path, problem, "write that method, or declare another coupling")
    return algorithm
