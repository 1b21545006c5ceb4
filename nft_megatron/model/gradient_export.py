"""The gradient of an update as a stream of Hugging Face tensors, whatever the layout."""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor

from nft_megatron.model.build import Chunks
from nft_megatron.model.export import hf_tensors
from nft_megatron.model.topology import Topology
from nft_megatron.weights import ModelShape


def hf_gradients(chunks: Chunks, topology: Topology, shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(name, float32 gradient)`` as :func:`hf_tensors` does; call it between a schedule and the optimizer.

    The distributed optimizer leaves each replica only the sum of its own shard, so the shards are first gathered in place.
    """
    for chunk in chunks:
        for buffers, group in (
            (chunk.buffers, topology.replica_group),
            (chunk.expert_parallel_buffers, topology.expert_replica_group),
        ):
            for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
                shards = list(bucket.grad_data.chunk(group.size()))
                dist.all_gather(shards, shards[group.rank()].clone(), group=group)
    return hf_tensors(chunks, topology, shape, lambda parameter: parameter.main_grad)  # type: ignore[attr-defined]
