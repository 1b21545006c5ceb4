"""The model on Megatron-Core: the only package that imports it.

``topology`` places this process, ``build`` creates its part of the model, ``load`` fills it from a Hugging Face folder and
``export`` reverses that, ``logprob`` scores tokens, ``step`` trains, ``optimizer`` updates, ``checkpoint`` saves and restores.
"""

import importlib
import logging
import warnings
from typing import Any

import torch

# Warnings that Megatron-Core prints in every run: missing fast paths (`nft-megatron doctor` lists them), and its own calls that
# torch 2.13 deprecates.
for _message in (
    ".*(Apex is not installed|Apex are not installed).*",
    "full scope is deprecated",
    "`torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead and we are deprecating ShardedTensor",
    "MimoModelConfig is experimental",
):
    warnings.filterwarnings("ignore", message=_message)


def _silence(logger: str, known: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: known not in record.getMessage())


# What a build of torch for CUDA says on a machine without a GPU, when Megatron-Core imports its compiler.
_silence("torch.utils.cpp_extension", "No CUDA runtime is found")

# What 0.19 announces for later versions; megatron.py says how each is answered.
_silence("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED")
_silence("megatron.core.distributed.distributed_data_parallel", "full_param_layout not provided")
_silence("megatron.core.dist_checkpointing.strategies.common", "load_common is deprecated")


def _eager(model: Any = None, **_: object) -> Any:
    """torch.compile that compiles nothing, also as a decorator with options."""
    return (lambda function: function) if model is None else model


def _import_megatron() -> None:
    """Import Megatron-Core, without a GPU in about four fifths of the time.

    It decorates small functions with torch.compile, which loads torch's compiler although nothing calls it on the CPU.
    """
    compiling = torch.compile
    if not torch.cuda.is_available():
        setattr(torch, "compile", _eager)  # noqa: B010 (mypy takes no other assignment to it)
    try:
        importlib.import_module("megatron.core.distributed")
        importlib.import_module("megatron.core.models.gpt")
    finally:
        setattr(torch, "compile", compiling)  # noqa: B010


_import_megatron()
