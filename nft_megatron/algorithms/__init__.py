"""Algorithms by name. A new one is a file with a builder, and its line in ``BUILDERS``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType

from nft_megatron.algorithms.algorithm import Algorithm, TokenBatch, TokenLoss, lookup
from nft_megatron.algorithms.nft import build_nft, build_rft

__all__ = ["BUILDERS", "Algorithm", "TokenBatch", "TokenLoss", "build_algorithm"]

BUILDERS: Mapping[str, Callable[..., Algorithm]] = MappingProxyType({"nft": build_nft, "rft": build_rft})


def build_algorithm(name: str, **options: object) -> Algorithm:
    """The algorithm of that name; ``options`` are the keyword arguments of its builder.

    Raises:
        UserError: an unknown name or option, with the nearest one there is, or an option's value that the builder refuses.

    >>> build_algorithm("nft", epsilon=0.5).uses_wrong_answers
    True
    >>> build_algorithm("nft", epsilom=0.5)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    nft_megatron.errors.UserError: algorithm.epsilom = epsilom: unknown; did you mean 'epsilon'? known: epsilon, ...
    """
    builder = lookup("algorithm.name", name, BUILDERS)
    parameters = inspect.signature(builder).parameters
    for option in options:
        lookup(f"algorithm.{option}", option, parameters)
    return builder(**options)
