"""The model as a stream of Hugging Face tensors, for files, engines and equality checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nft_megatron.model.load import table_parameters
from nft_megatron.model.settings import padded_vocab
from nft_megatron.model.topology import Topology
from nft_megatron.model.weight_gathering import gather_weights
from nft_megatron.weights import ModelShape, weight_table
from nft_megatron.weights.table import Entry, Layout, split


@torch.no_grad()
def hf_tensors(
    chunks: Sequence[torch.nn.Module],
    topology: Topology,
    shape: ModelShape,
    value: Callable[[torch.nn.Parameter], Tensor] = torch.Tensor.detach,
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(name, full tensor)`` in Hugging Face's order on rank 0; elsewhere participate but yield nothing.

    Every rank must exhaust the generator: the shards of one parameter at a time go over the tensor group to its rank 0, from
    there over the expert group and the pipeline group to global rank 0, which holds no more than that parameter. Tensors are in
    the model's dtype, on this rank's device, without vocabulary padding; a tied LM head is omitted, as in Hugging Face files.
    Ranks that hold the same weights as a participant stay idle. ``value``: maps a parameter to the tensor of its shape to yield
    instead of the parameter itself.
    """
    gather_weights(chunks)
    if topology.expert_replica_group.rank() != 0:
        return
    parameters = dict(table_parameters(chunks))
    rows = padded_vocab(shape, topology)
    for entry in weight_table(shape).entries:
        if not entry.exported:
            continue
        stage, holder = _stage(entry, shape, topology), _expert_rank(entry, shape, topology)
        stacked = None
        if (topology.pipeline_rank, topology.expert_rank) == (stage, holder):
            stacked = _gather(entry, value(parameters[entry.name]), topology)
        if topology.tensor_rank == 0:
            like = value(next(chunks[0].parameters()))
            size = (_num_shards(entry, topology), *entry.local_shape(topology.tensor_size, rows))
            if topology.pipeline_rank == stage:
                stacked = _to_first(stacked, holder, topology.expert_group, like, size)
            if topology.expert_rank == 0:
                stacked = _to_first(stacked, stage, topology.pipeline_group, like, size)
            if stacked is not None:
                yield from zip(entry.sources, split(entry, stacked.unbind(), rows), strict=True)


def _stage(entry: Entry, shape: ModelShape, topology: Topology) -> int:
    """The pipeline stage that holds an entry."""
    if entry.name.startswith("decoder.layers."):
        return topology.stages.stage_of(int(entry.name.split(".")[2]), shape.num_layers)
    return 0 if entry.name.startswith("embedding.") else topology.pipeline_size - 1


def _expert_rank(entry: Entry, shape: ModelShape, topology: Topology) -> int:
    """The expert-parallel rank that holds an expert, or that sends what all ranks hold."""
    if entry.expert is None or shape.experts is None:
        return 0
    return entry.expert * topology.expert_size // shape.experts.num_experts


def _num_shards(entry: Entry, topology: Topology) -> int:
    return 1 if entry.layout is Layout.WHOLE else topology.tensor_size


def _gather(entry: Entry, shard: Tensor, topology: Topology) -> Tensor | None:
    """All tensor ranks' shards, stacked, on the group's rank 0."""
    if _num_shards(entry, topology) == 1:
        return shard[None].contiguous()
    if topology.tensor_rank != 0:
        dist.gather(shard.contiguous(), group=topology.tensor_group, group_dst=0)
        return None
    stacked = shard.new_empty(topology.tensor_size, *shard.shape)
    dist.gather(shard.contiguous(), list(stacked.unbind()), group=topology.tensor_group, group_dst=0)
    return stacked


def _to_first(
    stacked: Tensor | None, source: int, group: dist.ProcessGroup, like: Tensor, size: tuple[int, ...]
) -> Tensor | None:
    """The tensor of rank ``source`` of ``group``, on the group's rank 0; None on other ranks."""
    if group.rank() == source != 0:
        assert stacked is not None
        dist.send(stacked, group=group, group_dst=0)
        return None
    if group.rank() == 0 != source:
        stacked = like.new_empty(size)
        dist.recv(stacked, group=group, group_src=source)
    return stacked
