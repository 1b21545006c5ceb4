"""Which rank holds what: a parallel layout, its cluster, and which layouts are impossible."""

from __future__ import annotations

from dataclasses import dataclass

from nft_megatron.base.errors import UserError
from nft_megatron.config.schema import Config
from nft_megatron.plan.hardware import Accelerator, accelerator
from nft_megatron.weights import ModelShape
from nft_megatron.weights.stages import Stages


@dataclass(frozen=True)
class Cluster:
    """GPUs that train and GPUs of nodes that only generate."""

    gpu: Accelerator
    gpus_per_node: int
    num_trainers: int
    num_rollout: int

    def bandwidth(self, size: int, stride: int) -> float:
        """Bytes/s, in each direction, of a GPU in a collective over ``size`` ranks that are ``stride`` apart.

        If the group spans nodes, its members on one node share their network cards.
        """
        if size * stride <= self.gpus_per_node:
            return self.gpu.node_bandwidth
        return min(self.gpu.node_bandwidth, self.gpu.network_bandwidth * max(1, self.gpus_per_node // stride))


def cluster_of(config: Config, gpus: int | None = None, kind: str | None = None) -> Cluster:
    """The cluster of ``config``, or ``gpus`` of them split between training and generating in the same proportion.

    Raises:
        UserError: for an unknown kind, or GPUs that do not fill whole nodes.
    """
    section = config.cluster
    per_node, train, roll = section.gpus_per_node, section.trainer_nodes, section.rollout_nodes
    gpu = accelerator(kind, "--gpu") if kind else accelerator(section.gpu)
    if gpus is None:
        return Cluster(gpu, per_node, train * per_node, roll * per_node)
    if gpus < 1 or (gpus > per_node and gpus % per_node):
        raise UserError(
            "--gpus", gpus, f"is not a number of whole nodes of {per_node} (cluster.gpus_per_node)", "use a multiple"
        )
    if gpus <= per_node:
        if roll:
            raise UserError(
                "--gpus",
                gpus,
                "is a single node, but cluster.rollout_nodes needs nodes of its own",
                "use more GPUs, or add cluster.rollout_nodes=0",
            )
        return Cluster(gpu, min(per_node, gpus), gpus, 0)
    nodes = gpus // per_node
    train = min(nodes - (roll > 0), max(1, round(nodes * train / (train + roll))))
    return Cluster(gpu, per_node, train * per_node, (nodes - train) * per_node)


@dataclass(frozen=True)
class ParallelLayout:
    """How model and sequences are split, and what trades memory for time.

    ``micro_batch_tokens`` is the size of a whole pack, which the context ranks split. ``expert`` of the data × context ranks
    share the experts of each layer. ``first_stage_layers``, ``last_stage_layers``: None for as many as the others have.

    >>> layout = ParallelLayout(4, 2, 1, 2, 8, True, "none", micro_batch_tokens=16384)
    >>> layout.num_gpus, layout.replicas, layout.local_tokens
    (128, 16, 8192)
    """

    tensor: int
    pipeline: int
    virtual_pipeline: int
    context: int
    data: int
    sequence_parallel: bool
    recompute: str
    micro_batch_tokens: int
    expert: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, over which gradients are summed and optimizer state is sharded."""
        return self.data * self.context

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.replicas // self.expert

    @property
    def num_gpus(self) -> int:
        return self.tensor * self.pipeline * self.replicas

    @property
    def sequence_shards(self) -> int:
        """Tensor ranks over which activations outside attention and MLP are split."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def local_tokens(self) -> int:
        """Tokens of a full pack on one context rank."""
        return self.micro_batch_tokens // self.context

    @property
    def stages(self) -> Stages:
        """Which layers a pipeline stage has."""
        return Stages(self.pipeline, self.virtual_pipeline, self.first_stage_layers, self.last_stage_layers)

    def in_flight(self, stage: int, num_micro_batches: int) -> float:
        """Most micro-batches whose activations a stage stores at once; parts of a stage count as fractions.

        1F1B: stage s runs p − s − 1 forward passes before its first backward. Interleaved: 2(p − s − 1) + (v − 1)p passes, each
        through one of its v parts (Megatron-Core 0.16.1, pipeline_parallel/schedules.py, get_pp_rank_microbatches).
        """
        ahead = self.pipeline - stage - 1
        if self.virtual_pipeline == 1:
            return min(num_micro_batches, ahead + 1)
        parts = 2 * ahead + (self.virtual_pipeline - 1) * self.pipeline + 1
        return min(num_micro_batches * self.virtual_pipeline, parts) / self.virtual_pipeline

    def __str__(self) -> str:
        parts = f" x virtual {self.virtual_pipeline}" if self.virtual_pipeline > 1 else ""
        experts = f", experts over {self.expert}" if self.expert > 1 else ""
        ends = ((self.first_stage_layers, "first"), (self.last_stage_layers, "last"))
        parts += "".join(f", {count} layers in the {which} stage" for count, which in ends if count is not None)
        return f"tensor {self.tensor} x pipeline {self.pipeline}{parts} x context {self.context} x data {self.data}{experts}"


def layout_of(config: Config, cluster: Cluster) -> ParallelLayout:
    """The layout of ``config`` over the cluster's trainers.

    Raises:
        UserError: if the trainers cannot be divided that way.
    """
    parallel = config.parallel
    replica = parallel.tensor * parallel.pipeline * parallel.context
    if cluster.num_trainers % replica:
        raise UserError(
            "parallel.tensor, parallel.pipeline, parallel.context",
            f"{parallel.tensor} × {parallel.pipeline} × {parallel.context}",
            f"does not divide the {cluster.num_trainers} training GPUs",
            "change them or cluster.trainer_nodes; `plan --layouts` lists those that fit",
        )
    num_replicas = cluster.num_trainers // (parallel.tensor * parallel.pipeline)
    if num_replicas % parallel.expert:
        problem = f"does not divide the {num_replicas} data × context ranks"
        raise UserError("parallel.expert", parallel.expert, problem, "set it to a divisor")
    return ParallelLayout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        context=parallel.context,
        data=cluster.num_trainers // replica,
        sequence_parallel=parallel.sequence_parallel,
        recompute=config.model.recompute,
        micro_batch_tokens=config.train.micro_batch_tokens,
        expert=parallel.expert,
        first_stage_layers=parallel.first_stage_layers,
        last_stage_layers=parallel.last_stage_layers,
    )


def check_layout(shape: ModelShape, layout: ParallelLayout) -> None:
    """Raise :class:`UserError` if the model cannot be split that way."""
    for what, size in (
        ("attention heads", shape.num_attention_heads),
        ("key-value heads", shape.num_query_groups),
        ("MLP units", shape.ffn_hidden_size if shape.experts is None else shape.experts.ffn_hidden_size),
    ):
        if size % layout.tensor:
            raise UserError("parallel.tensor", layout.tensor, f"does not divide the model's {size} {what}", "choose a divisor")
    num_experts = 1 if shape.experts is None else shape.experts.num_experts
    if num_experts % layout.expert:
        problem = f"does not divide the {num_experts} experts of a layer" if shape.experts else "the model has no experts"
        raise UserError("parallel.expert", layout.expert, problem, f"choose a divisor of {num_experts}")
    if shape.experts is not None and layout.tensor > 1 and not layout.sequence_parallel:
        raise UserError("parallel.sequence_parallel", False, "experts under tensor parallelism require it", "set it to true")
    layout.stages.layers(shape.num_layers)
