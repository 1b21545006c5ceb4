"""The real model of any rank of any layout, without allocating its memory or starting other processes.

Parameters live on torch's meta device, which stores shapes but no data. The process groups are torch's fake ones: a process
has a rank and a world size but no peers. So one process builds every rank of a cluster in turn, about twenty per second, and
``nft-megatron plan --check`` compares them with the plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from nft_megatron.base.errors import UserError
from nft_megatron.base.rank_info import RankInfo
from nft_megatron.model.build import build_parts
from nft_megatron.model.cpu import adapt_to_cpu
from nft_megatron.model.load import table_parameters
from nft_megatron.model.settings import transformer_config
from nft_megatron.model.topology import Topology, shutdown, take_place
from nft_megatron.plan.estimate import Plan
from nft_megatron.plan.layouts import ParallelLayout
from nft_megatron.weights import ModelShape


@dataclass(frozen=True)
class MetaRank:
    """A rank's position in the grid, and its parameters.

    shapes: by the names of the weight table. num_bytes: of all parameters.
    """

    rank: int
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    data_rank: int
    shapes: dict[str, tuple[int, ...]]
    num_bytes: int


def meta_ranks(shape: ModelShape, layout: ParallelLayout, dtype: torch.dtype = torch.bfloat16) -> Iterator[MetaRank]:
    """Every rank of ``layout`` in turn, its model built as for a GPU (with Megatron's local layers and padded vocabulary).

    Call it when no process group is open; none is open afterwards.

    Raises:
        UserError: if the model cannot be split that way.
    """
    for rank in range(layout.num_gpus):
        with fake_place(rank, layout, torch.device("meta")) as topology:
            yield _built(shape, topology, layout.sequence_parallel, dtype)


def check_plan(plan: Plan, dtype: str) -> str:
    """Build every rank's model and compare its bytes with those of its stage in ``plan``; returns a one-sentence result.

    Raises:
        UserError: for a plan of a CPU, which pads the vocabulary differently.
    """
    if not plan.training.cluster.gpu.is_gpu:
        raise UserError("--check", "cpu", "builds models as for GPUs", "choose a kind of GPU")
    layout, stages = plan.training.layout, plan.training.stages
    num_bytes = 0
    for rank in meta_ranks(plan.shape, layout, getattr(torch, dtype)):
        planned = stages[rank.pipeline_rank].parameters
        assert rank.num_bytes == planned, f"rank {rank.rank} holds {rank.num_bytes} bytes of parameters, not {planned}"
        num_bytes += rank.num_bytes
    return (
        f"Checked: the models of all {layout.num_gpus} ranks, built on the meta device, hold the planned parameters, "
        f"{num_bytes:,} bytes together."
    )


def _built(shape: ModelShape, topology: Topology, sequence_parallel: bool, dtype: torch.dtype) -> MetaRank:
    config = transformer_config(shape, topology, dtype, sequence_parallel, "none", variable_lengths=True)
    with torch.device("meta"):
        parameters = dict(table_parameters(list(build_parts(shape, topology, config))))
    assert all(parameter.is_meta for parameter in parameters.values())
    return MetaRank(
        rank=topology.rank,
        tensor_rank=topology.tensor_rank,
        pipeline_rank=topology.pipeline_rank,
        context_rank=topology.context_rank,
        data_rank=topology.data_rank,
        shapes={name: tuple(parameter.shape) for name, parameter in parameters.items()},
        num_bytes=sum(parameter.nbytes for parameter in parameters.values()),
    )


@contextmanager
def fake_place(rank: int, layout: ParallelLayout, device: torch.device) -> Iterator[Topology]:
    """The topology of ``rank`` among processes that do not exist; collectives are no-ops. Call it when no group is open."""
    if not torch.cuda.is_available():
        adapt_to_cpu()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.num_gpus)
    try:
        yield take_place(
            RankInfo(rank, layout.num_gpus),
            device,
            layout.tensor,
            layout.context,
            layout.stages,
            expert=layout.expert,
            timeout_seconds=600.0,
            host_group=dist.new_group(),
            control_group=dist.new_group(),
        )
    finally:
        shutdown()
