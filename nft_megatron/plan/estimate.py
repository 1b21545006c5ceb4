"""The whole plan of a configuration: memory of every stage, time of a rollout step, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nft_megatron.base.errors import UserError
from nft_megatron.config.schema import Config
from nft_megatron.plan.compute import model_flops
from nft_megatron.plan.generation import Generation, generation
from nft_megatron.plan.layouts import Cluster, ParallelLayout, check_layout
from nft_megatron.plan.memory import ELEMENT, StageMemory, stage_memory
from nft_megatron.plan.publish import Publish, publish_time, save_time
from nft_megatron.plan.servers import servers_of, with_tensor_parallel
from nft_megatron.plan.storage import Disk, HostMemory, copied_bytes, disk, host_memory
from nft_megatron.plan.switches import Switches
from nft_megatron.plan.time import TrainTime, train_time
from nft_megatron.plan.workload import Assumptions, Packs, Workload, pack_update, workload_of
from nft_megatron.weights import ModelShape, num_parameters

GRADING_SECONDS = {True: 20e-3, False: 1e-3}
"""Assumed seconds of grading per answer: under ``verify.mode`` math-verify, and under the others, which seldom need it."""


@dataclass(frozen=True)
class TrainPlan:
    """The trainers' part of a plan. stages: memory per rank of each pipeline stage."""

    cluster: Cluster
    layout: ParallelLayout
    packs: Packs
    stages: tuple[StageMemory, ...]
    time: TrainTime

    @property
    def peak(self) -> float:
        """Bytes of the fullest stage."""
        return max(stage.peak for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether every stage stays within the usable share of a GPU's memory."""
        return max(stage.demand for stage in self.stages) <= self.cluster.gpu.memory


@dataclass(frozen=True)
class Plan:
    """What is expected of a run.

    generate, verify: seconds per rollout step; they follow each other, and ``verify`` is what remains of it after the last
    answer. save: mean seconds per step that training waits for checkpoints and exports. overlaps: whether the next step's
    answers are generated during ``training.time`` (rollout.max_staleness). better_tensor_parallel: the size of servers on the
    same GPUs that takes the least time, and its seconds. utilisation: FLOPs of the model in the updates over those that the
    trainers could do in that time.
    """

    shape: ModelShape
    num_parameters: int
    work: Workload
    training: TrainPlan
    generation: Generation
    verify: float
    publish: Publish
    save: float
    overlaps: bool
    host: HostMemory
    disk: Disk
    better_tensor_parallel: tuple[int, float]
    utilisation: float
    num_steps: int

    @property
    def generate(self) -> float:
        return self.generation.seconds

    @property
    def step_seconds(self) -> float:
        collect, train = self.generate + self.verify, self.training.time.total
        return (max(collect, train) if self.overlaps else collect + train) + self.publish.seconds + self.save


def plan_training(config: Config, shape: ModelShape, cluster: Cluster, layout: ParallelLayout, work: Workload) -> TrainPlan:
    """Memory and time of the trainers.

    Raises:
        UserError: if the model or a sequence does not allow that layout.
    """
    check_layout(shape, layout)
    packs = pack_update(config, shape, layout, work)
    dtype, cpu_offload = config.model.dtype, config.optimizer.cpu_offload
    switches = Switches.of(config, on_gpu=cluster.gpu.is_gpu)
    stages = tuple(
        stage_memory(
            shape,
            layout,
            stage,
            dtype=dtype,
            on_gpu=cluster.gpu.is_gpu,
            num_micro_batches=packs.num_micro_batches,
            cpu_offload=cpu_offload,
            switches=switches,
        )
        for stage in range(layout.pipeline)
    )
    time = train_time(
        shape,
        layout,
        cluster,
        packs,
        num_updates=work.num_updates,
        dtype=dtype,
        cpu_offload=cpu_offload,
        switches=switches,
    )
    if config.train.old_logprobs == "engine":
        time = replace(time, old_logprobs=0.0)
    return TrainPlan(cluster, layout, packs, stages, time)


def make_plan(config: Config, shape: ModelShape, cluster: Cluster, layout: ParallelLayout, assumptions: Assumptions) -> Plan:
    """The plan of ``config`` under ``layout``, even if it does not fit.

    Raises:
        UserError: if the model or a sequence does not allow that layout.
    """
    check_model(config, shape)
    work = workload_of(config, assumptions)
    training = plan_training(config, shape, cluster, layout, work)
    servers = servers_of(config, shape, cluster)
    engines = generation(shape, servers, work)
    grading = GRADING_SECONDS[config.verify.mode == "math-verify"] * work.num_asked / config.verify.workers
    fullest = max(training.stages, key=lambda stage: stage.parameters + stage.offloaded)
    element = ELEMENT[config.model.dtype]
    return Plan(
        shape=shape,
        num_parameters=num_parameters(shape),
        work=work,
        training=training,
        generation=engines,
        verify=max(0.0, grading - engines.seconds),
        publish=publish_time(config, shape, cluster, servers),
        save=save_time(config, shape, cluster, copied_bytes(fullest, element)),
        overlaps=config.rollout.max_staleness > 0 and servers.overlaps,
        host=host_memory(config, shape, cluster, servers, work, fullest, element),
        disk=disk(config, shape, work, servers),
        better_tensor_parallel=_better_tensor_parallel(config, shape, work, engines),
        utilisation=_utilisation(config, shape, work, training),
        num_steps=config.train.num_steps,
    )


def _better_tensor_parallel(config: Config, shape: ModelShape, work: Workload, now: Generation) -> tuple[int, float]:
    """The fastest size of servers on the same GPUs, and its seconds."""
    sizes = (size for size in (1, 2, 4, 8) if size <= config.cluster.gpus_per_node and now.servers.overlaps)
    others = (with_tensor_parallel(now.servers, config, shape, size) for size in sizes)
    found = [generation(shape, each, work) for each in others if each is not None and each.num >= config.fleet.min_servers]
    best = min([now, *found], key=lambda each: each.seconds)
    return best.servers.gpus, best.seconds


def _utilisation(config: Config, shape: ModelShape, work: Workload, training: TrainPlan) -> float:
    lengths = [work.prompt_tokens + answer for answer in work.answer_lengths]
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    asked_for = work.num_updates * model_flops(shape, sum(lengths), pairs, sum(work.answer_lengths))
    updating = training.time.total - training.time.old_logprobs
    cluster = training.cluster
    return asked_for / (updating * cluster.num_trainers * cluster.gpu.flops_of(config.model.dtype))


def check_model(config: Config, shape: ModelShape) -> None:
    """Raise :class:`UserError` for what no layout changes: a context longer than the model's."""
    config.check_context(shape.max_positions)
    if config.kernels.overlap_tensor_communication and shape.experts is not None:
        raise UserError(
            "kernels.overlap_tensor_communication",
            True,
            "is for the dense layers of Transformer Engine, on a GPU and in bfloat16",
            "set it to false",
        )
