"""The grid of processes: every rank has one position in pipeline × data × context × tensor.

Adjacent ranks share a tensor group; context ranks are further apart, then data ranks, and pipeline stages are farthest apart
(Megatron's order ``tp-cp-ep-dp-pp``). A group of size 1 is an ordinary group. This file is the only one that fills and clears
Megatron's global ``parallel_state``; everything else in this package takes its groups from :class:`Topology`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nft_megatron.base.errors import UserError
from nft_megatron.base.rank_info import RankInfo, rank_info
from nft_megatron.model.cpu import adapt_to_cpu
from nft_megatron.model.tensor_overlap import close_buffers
from nft_megatron.weights.stages import Stages

ProcessGroup = dist.ProcessGroup


@dataclass(frozen=True, eq=False)
class Topology:
    """This process's position and groups.

    ``virtual_pipeline``: parts of the model that each pipeline stage holds. ``stages``: the layers of each stage.
    ``replica_group``: the ranks that hold the same weights, data × context of them; gradients are summed and optimizer state is
    sharded over it. The experts of a layer are spread over ``expert_group``, a consecutive part of it; for them
    ``expert_replica_group`` replaces it. ``host_group`` and ``control_group`` span all ranks over gloo: for what is on the CPU.
    The deadline of ``host_group`` is that of every collective, ``timeout``; on ``control_group`` ranks wait for work that one
    of them does alone.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    virtual_pipeline: int
    stages: Stages
    context_rank: int
    context_size: int
    data_rank: int
    data_size: int
    expert_rank: int
    expert_size: int
    tensor_group: ProcessGroup
    pipeline_group: ProcessGroup
    context_group: ProcessGroup
    replica_group: ProcessGroup
    expert_group: ProcessGroup
    expert_replica_group: ProcessGroup
    host_group: ProcessGroup
    control_group: ProcessGroup
    timeout: datetime.timedelta

    @property
    def is_main(self) -> bool:
        """Whether this rank reports to the user and writes the run folder."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this stage holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this stage holds the final norm and the LM head; only there a loss exists."""
        return self.pipeline_rank == self.pipeline_size - 1


def _check_sizes(world_size: int, tensor: int, pipeline: int, context: int, expert: int) -> None:
    sizes = {"parallel.tensor": tensor, "parallel.pipeline": pipeline, "parallel.context": context}
    for field, size in sizes.items():
        if size < 1:
            raise UserError(field, size, "must be at least 1", "set it to 1 or more")
        if world_size % size:
            raise UserError(field, size, f"does not divide the {world_size} processes of this run", "set it to a divisor")
    if world_size % (tensor * pipeline * context):
        raise UserError(
            ", ".join(sizes),
            f"{tensor} × {pipeline} × {context}",
            f"does not divide the {world_size} processes of this run",
            f"start a multiple of {tensor * pipeline * context} processes, or lower one of them",
        )
    num_replicas = world_size // (tensor * pipeline)
    if expert < 1 or num_replicas % expert:
        raise UserError(
            "parallel.expert", expert, f"does not divide the {num_replicas} data × context ranks", "set it to a divisor"
        )


def init_topology(
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
    *,
    virtual_pipeline: int = 1,
    first_stage_layers: int | None = None,
    last_stage_layers: int | None = None,
    expert: int = 1,
    timeout_seconds: float = 600.0,
    control_timeout_seconds: float = 600.0,
    threads: int | None = None,
    seed: int = 1,
) -> Topology:
    """Join the other processes and return this one's topology.

    Args:
        tensor: ranks that share each layer; pipeline: stages that share the layers; context: ranks that share each sequence.
            The remaining factor is data parallel.
        virtual_pipeline: parts of the model on each stage; more than one for the interleaved schedule.
        first_stage_layers, last_stage_layers: where those stages do not have as many layers as the others.
        expert: ranks, of data × context, that share the experts of each layer.
        timeout_seconds: deadline of every collective; a rank that waits longer raises instead of hanging.
        control_timeout_seconds: the same for the control group, on which ranks wait for rank 0 to collect answers.
        threads: intra-op threads of torch on the CPU; ``None`` leaves torch's choice.
        seed: of Megatron's generators (dropout, which training here never uses).

    Raises:
        UserError: naming ``parallel.tensor`` or ``parallel.pipeline`` if they do not divide the number of processes.
    """
    here = rank_info()
    rank, world_size, local_rank = here.rank, here.world_size, here.local_rank
    _check_sizes(world_size, tensor, pipeline, context, expert)
    if threads is not None:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank % torch.cuda.device_count()), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        adapt_to_cpu()
    from megatron.core import tensor_parallel

    timeout = datetime.timedelta(seconds=timeout_seconds)
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, init_method="env://", rank=rank, world_size=world_size, timeout=timeout)
    control_timeout = datetime.timedelta(seconds=control_timeout_seconds)
    control_group = dist.new_group(backend="gloo", timeout=control_timeout)
    host_group = dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else dist.group.WORLD
    assert host_group is not None
    topology = take_place(
        here,
        device,
        tensor,
        context,
        Stages(pipeline, virtual_pipeline, first_stage_layers, last_stage_layers),
        expert=expert,
        timeout_seconds=timeout_seconds,
        host_group=host_group,
        control_group=control_group,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return topology


def take_place(
    here: RankInfo,
    device: torch.device,
    tensor: int,
    context: int,
    stages: Stages,
    *,
    expert: int = 1,
    timeout_seconds: float,
    host_group: ProcessGroup,
    control_group: ProcessGroup,
) -> Topology:
    """The second half of :func:`init_topology`: create the groups of a process that has joined the others."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=stages.num,
        virtual_pipeline_model_parallel_size=stages.parts if stages.parts > 1 else None,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        distributed_timeout_minutes=timeout_seconds / 60,
        create_gloo_process_groups=False,
    )
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    context_group = parallel_state.get_context_parallel_group()
    data_group = parallel_state.get_data_parallel_group()
    expert_group = parallel_state.get_expert_model_parallel_group()
    return Topology(
        rank=here.rank,
        world_size=here.world_size,
        local_rank=here.local_rank,
        device=device,
        tensor_rank=tensor_group.rank(),
        tensor_size=tensor_group.size(),
        pipeline_rank=pipeline_group.rank(),
        pipeline_size=pipeline_group.size(),
        virtual_pipeline=stages.parts,
        stages=stages,
        context_rank=context_group.rank(),
        context_size=context_group.size(),
        data_rank=data_group.rank(),
        data_size=data_group.size(),
        expert_rank=expert_group.rank(),
        expert_size=expert_group.size(),
        tensor_group=tensor_group,
        pipeline_group=pipeline_group,
        context_group=context_group,
        replica_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        expert_group=expert_group,
        expert_replica_group=parallel_state.get_expert_data_parallel_group(),
        host_group=host_group,
        control_group=control_group,
        timeout=datetime.timedelta(seconds=timeout_seconds),
    )


def with_own_control_group(topology: Topology, timeout_seconds: float) -> Topology:
    """The same topology with a new control group, for one additional thread. A collective over all ranks."""
    timeout = datetime.timedelta(seconds=timeout_seconds)
    return dataclasses.replace(topology, control_group=dist.new_group(backend="gloo", timeout=timeout))


def shutdown() -> None:
    """Leave the process groups. Call it once, last, with no collective in progress; no group may be used afterwards.

    The caller's local variables may still hold groups, but none may survive until the interpreter exits, where gloo's threads
    can abort it: hence the collection of cycles.
    """
    from megatron.core import parallel_state

    if not dist.is_initialized():
        return
    has_threads = dist.get_backend() != "fake"  # the groups of nft_megatron/model/meta.py have none, and a collection is slow
    close_buffers()
    parallel_state.destroy_model_parallel()
    if has_threads:
        gc.collect()
    dist.destroy_process_group()
    if has_threads:
        gc.collect()


@contextlib.contextmanager
def distributed(tensor: int = 1, pipeline: int = 1, context: int = 1, **settings: Any) -> Iterator[Topology]:
    """:func:`init_topology` and :func:`shutdown` as a ``with`` block; run the training in a function that it calls."""
    try:
        yield init_topology(tensor, pipeline, context, **settings)
    finally:
        shutdown()
