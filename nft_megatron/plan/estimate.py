"""The whole plan of a configuration: memory of every stage, time of a rollout step, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass

from nft_megatron.base.errors import UserError
from nft_megatron.config.schema import Config
from nft_megatron.plan.compute import model_flops, num_parameters
from nft_megatron.plan.generation import MEMORY_SHARE, Generation, generation
from nft_megatron.plan.hardware import ACHIEVABLE
from nft_megatron.plan.layouts import Cluster, ParallelLayout, check_layout
from nft_megatron.plan.memory import StageMemory, stage_memory
from nft_megatron.plan.time import TrainTime, train_time
from nft_megatron.plan.workload import Assumptions, Packs, Workload, pack_update, workload_of
from nft_megatron.weights import ModelShape

FIT = 0.9
"""Share of a GPU's memory that a plan may use; the rest covers fragmentation and errors of the estimate."""

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
        return self.peak <= FIT * self.cluster.gpu.memory


@dataclass(frozen=True)
class Plan:
    """What is expected of a run.

    generation: None if no engine fits. generate, verify, publish: seconds per rollout step in addition to ``training.time``;
    they follow each other, and ``verify`` is what remains of it after the last answer. utilisation: FLOPs of the model in the
    updates over those that the trainers could do in that time.
    """

    shape: ModelShape
    num_parameters: int
    work: Workload
    training: TrainPlan
    generation: Generation | None
    generate: float
    verify: float
    publish: float
    utilisation: float
    num_steps: int

    @property
    def step_seconds(self) -> float:
        return self.generate + self.verify + self.training.time.total + self.publish


def plan_training(config: Config, shape: ModelShape, cluster: Cluster, layout: ParallelLayout, work: Workload) -> TrainPlan:
    """Memory and time of the trainers.

    Raises:
        UserError: if the model or a sequence does not allow that layout.
    """
    check_layout(shape, layout)
    packs = pack_update(config, shape, layout, work)
    dtype, cpu_offload = config.model.dtype, config.optimizer.cpu_offload
    stages = tuple(
        stage_memory(
            shape,
            layout,
            stage,
            dtype=dtype,
            on_gpu=cluster.gpu.is_gpu,
            num_micro_batches=packs.num_micro_batches,
            cpu_offload=cpu_offload,
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
        fused_gradients=config.kernels.gradient_accumulation_fusion or not cluster.gpu.is_gpu,
    )
    return TrainPlan(cluster, layout, packs, stages, time)


def make_plan(config: Config, shape: ModelShape, cluster: Cluster, layout: ParallelLayout, assumptions: Assumptions) -> Plan:
    """The plan of ``config`` under ``layout``, even if it does not fit.

    Raises:
        UserError: if the model or a sequence does not allow that layout.
    """
    check_model(config, shape)
    work = workload_of(config, assumptions)
    training = plan_training(config, shape, cluster, layout, work)
    taken = 0.0 if cluster.num_rollout else max(s.parameters + s.gradients + s.optimizer + s.runtime for s in training.stages)
    engines = generation(shape, cluster, work, MEMORY_SHARE * cluster.gpu.memory - taken)
    generate = engines.seconds if engines else 0.0
    grading = GRADING_SECONDS[config.verify.mode == "math-verify"] * work.num_asked / config.verify.workers
    return Plan(
        shape=shape,
        num_parameters=num_parameters(shape),
        work=work,
        training=training,
        generation=engines,
        generate=generate,
        verify=max(0.0, grading - generate),
        publish=publish_seconds(shape, cluster),
        utilisation=_utilisation(config, shape, work, training),
        num_steps=config.train.num_steps,
    )


def _utilisation(config: Config, shape: ModelShape, work: Workload, training: TrainPlan) -> float:
    lengths = [work.prompt_tokens + answer for answer in work.answer_lengths]
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    asked_for = work.num_updates * model_flops(shape, sum(lengths), pairs, sum(work.answer_lengths))
    updating = training.time.total - training.time.old_logprobs
    cluster = training.cluster
    return asked_for / (updating * cluster.num_trainers * cluster.gpu.flops_of(config.model.dtype))


def check_model(config: Config, shape: ModelShape) -> None:
    """Raise :class:`UserError` for what no layout changes: experts, and a context longer than the model's."""
    if shape.experts is not None:
        raise UserError(
            "model.path",
            config.model.path,
            "has experts, but plans support only dense models",
            "train it without a plan, using the layout of a similar model",
        )
    config.check_context(shape.max_positions)


def publish_seconds(shape: ModelShape, cluster: Cluster) -> float:
    """Seconds to move the bfloat16 weights through the first rank's network card: in from trainers, out to engines."""
    return 2 * 2 * num_parameters(shape) / (cluster.gpu.network_bandwidth * ACHIEVABLE.network)
