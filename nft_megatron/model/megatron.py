"""Where the supported versions of Megatron-Core, 0.16.1 to 0.19, differ: one switch each, by what is there, not by number.

Everything else in this package is the same call on every version. What 0.19 announces for later, and what will be done then:

- ``common.pt``. 0.19 still reads it but writes its content as a sharded object, ``common_state``. Our checkpoints keep the
  file, which both ends read; a version that stops reading it needs that object written beside it.
- Its own asynchronous save gives way to nvidia-resiliency-ext. Neither is used (see :mod:`.checkpoint`).
- ``GPTModel`` gives way to ``HybridModel``. Its layer specs, embedding, head and checkpoint names are the same, so
  :class:`.policy.PolicyModel` would change its base class.
- ``DistributedDataParallel`` wants ``full_param_layout`` from its caller, and lays its buffers out itself as long as it may.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import StateDict
from megatron.core.dist_checkpointing.strategies import common as common_files
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def gradients_for_norm(optimizer: DistributedOptimizer) -> list[Tensor]:
    """This rank's shards of the gradient, each parameter on one of the ranks that hold it. Renamed in 0.17."""
    if hasattr(optimizer, "get_grads_for_grad_norm"):
        return optimizer.get_grads_for_grad_norm()
    return optimizer.get_main_grads_for_grad_norm()


def load_through(state: StateDict, folder: str, strategy: TorchDistLoadShardedStrategy, common: StateDict) -> StateDict:
    """``dist_checkpointing.load`` by ``strategy``, with a ``common`` part that has been read already.

    Until 0.16 a strategy gives the common part; from 0.17 on ``load`` reads it itself, with pickle, through a function that is
    replaced here. Keys that the checkpoint lacks raise.
    """
    options: dict[str, Any] = {"strict": StrictHandling.RAISE_UNEXPECTED, "sharded_strategy": strategy}
    if "common_strategy" in signature(serialization.load).parameters:
        given = type("_Given", (common_files.TorchCommonLoadStrategy,), {"load_common": lambda self, checkpoint_dir: common})
        return serialization.load(state, folder, common_strategy=given(), **options)
    read, serialization.load_common_state_dict = serialization.load_common_state_dict, lambda checkpoint_dir: common
    try:
        return serialization.load(state, folder, **options)
    finally:
        serialization.load_common_state_dict = read


@contextmanager
def engine_fuses_gradients(config: TransformerConfig) -> Iterator[None]:
    """Build a model in which Transformer Engine's kernel adds weight gradients to ``main_grad``, if ``config`` asks for that.

    Megatron's own LM head, a ``ColumnParallelLinear``, insists on apex's kernel then (tensor_parallel/layers.py:924). It is
    never called here: the matrix products of the LM head are this project's (lm_head.py). All other layers are the engine's.
    """
    installed = layers._grad_accum_fusion_available
    layers._grad_accum_fusion_available = installed or config.transformer_impl == "transformer_engine"
    try:
        yield
    finally:
        layers._grad_accum_fusion_available = installed
