"""The buffers through which Transformer Engine overlaps tensor-parallel communication with matrix products.

``kernels.overlap_tensor_communication``: Megatron-Core tells the layers to use them (``tp_comm_overlap``), and whoever trains
creates them, as Megatron-LM does in _initialize_tp_communicators (training/initialize.py). They hold one pack's hidden states,
so all packs must have that length.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from nft_megatron.model.topology import Topology

_MODULE = "transformer_engine.pytorch.module.base"


def buffer_arguments(topology: Topology, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> dict[str, object]:
    """Arguments of ``initialize_ub`` for packs of ``num_tokens`` over all context ranks."""
    return {
        "shape": [num_tokens // topology.context_size, hidden_size],
        "tp_size": topology.tensor_size,
        "dtype": dtype,
        "bootstrap_backend": "nccl",
    }


def open_buffers(topology: Topology, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
    """Create the buffers; layers insist on finding them when they are built. A collective over all ranks."""
    from transformer_engine.pytorch.module import base

    base.initialize_ub(**buffer_arguments(topology, num_tokens, hidden_size, dtype))


def close_buffers() -> None:
    """Release the buffers, which hold process groups; nothing if there are none."""
    module = sys.modules.get(_MODULE)
    if module is not None and module._ub_communicators is not None:
        module.destroy_ub()
