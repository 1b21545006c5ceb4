"""Weights that ranks gather during the next forward pass, ``kernels.overlap_parameter_gather``.

The distributed optimizer updates this rank's shard of the weights. Megatron then gathers them bucket by bucket: a hook before
each layer's forward pass waits for the layer's bucket and starts the next one. So weights are complete only where a forward
pass has been, and whatever else reads them must wait itself: the LM head, which is no layer here, exports and checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel


def gather_weights(chunks: Sequence[torch.nn.Module]) -> None:
    """Complete all weights on every rank. A collective over the ranks that hold the same weights.

    Call it before weights are read or replaced outside of a forward pass.
    """
    for chunk in chunks:
        if (ddp := _overlapping(chunk)) is not None:
            for group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
                if group.param_gather_handle is not None or not group.param_gather_dispatched:
                    group.start_param_sync(force_sync=True)


def gather_replaced_weights(chunks: Sequence[DistributedDataParallel]) -> None:
    """Give every rank the weights that others hold, after each has replaced its own. A collective, as after an update.

    Whatever the ranks gathered before must be complete (:func:`gather_weights`), or this waits for that alone.
    """
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)


def await_weight(chunk: torch.nn.Module, weight: torch.nn.Parameter) -> None:
    """In a forward pass, wait for a weight that is used outside of its layer."""
    if (ddp := _overlapping(chunk)) is not None:
        ddp.param_to_bucket_group[weight].finish_param_sync()


def _overlapping(chunk: torch.nn.Module) -> DistributedDataParallel | None:
    return chunk if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather else None
