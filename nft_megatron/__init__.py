"""Negative-aware Fine-Tuning (NFT, arXiv 2505.18116) on Megatron-Core.

The functions below are for notebooks; docs/python_api.md shows each. They are imported on first use, so ``import nft_megatron``
costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nft_megatron.base.version import __version__ as __version__

if TYPE_CHECKING:
    from nft_megatron.config.load import load_config
    from nft_megatron.convert.commands import convert_checkpoint
    from nft_megatron.evaluate.folder import evaluate_folder as evaluate_model
    from nft_megatron.plan.command import plan_run
    from nft_megatron.train import train as run_training
    from nft_megatron.verify.grade_answers import grade_answers

__all__ = ["convert_checkpoint", "evaluate_model", "grade_answers", "load_config", "plan_run", "run_training"]

_WHERE = {
    "convert_checkpoint": ("convert.commands", "convert_checkpoint"),
    "evaluate_model": ("evaluate.folder", "evaluate_folder"),
    "grade_answers": ("verify.grade_answers", "grade_answers"),
    "load_config": ("config.load", "load_config"),
    "plan_run": ("plan.command", "plan_run"),
    "run_training": ("train", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, function = _WHERE[name]
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), function)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
