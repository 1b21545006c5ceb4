"""How long the trainers take for a rollout step, by roofline: estimates.

Each kind of work runs at its assumed share of the vendor's figure (``ACHIEVABLE`` in :mod:`.hardware`). Collectives of a layer
block, except those that Megatron-Core overlaps with a matrix product; gradients are summed during the last backward pass. The
slowest pipeline stage sets the pace, and the bubble is the part (p − 1)/(m·v + p − 1) of the time of m micro-batches on p
stages of v parts (arXiv 2104.04473, section 2.2).

Bytes per rank and collective of N bytes over n ranks: all-gather and reduce-scatter N·(n − 1)/n.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from nft_megatron.plan.activations import FLOAT32
from nft_megatron.plan.compute import Work, stage_work
from nft_megatron.plan.hardware import ACHIEVABLE
from nft_megatron.plan.layouts import Cluster, ParallelLayout
from nft_megatron.plan.memory import ELEMENT, stage_experts, stage_numel
from nft_megatron.plan.switches import DEFAULTS, Switches
from nft_megatron.plan.workload import Packs
from nft_megatron.weights import ModelShape

EXPERT_SECONDS = 40e-6
"""Assumed host time per expert, layer and forward pass: its two products and its activation are kernels of their own."""


@dataclass(frozen=True)
class TrainTime:
    """Seconds per rollout step on the slowest rank. The five communications count only the time spent waiting.

    old_logprobs includes its own communication and bubble. gradient_adds: a pass over every weight's gradient after each
    micro-batch, without ``kernels.gradient_accumulation_fusion``.
    """

    old_logprobs: float
    forward: float
    backward: float
    tensor_communication: float
    context_communication: float
    expert_communication: float
    pipeline_communication: float
    data_communication: float
    pipeline_bubble: float
    optimizer: float
    gradient_adds: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class LayerTraffic:
    """Bytes that one rank receives, and waits for, in all packs of an update: (forward, backward)."""

    tensor: tuple[float, float]
    context: tuple[float, float]
    expert: tuple[float, float]
    pipeline: tuple[float, float]


def bubble_share(num_stages: int, num_parts: int, num_micro_batches: int) -> float:
    """The share of an update during which a pipeline stage is idle, if all stages are equally fast.

    >>> round(bubble_share(num_stages=4, num_parts=1, num_micro_batches=12), 2)
    0.2
    """
    return (num_stages - 1) / (num_micro_batches * num_parts + num_stages - 1)


def traffic(shape: ModelShape, layout: ParallelLayout, stage: int, packs: Packs, dtype: str) -> LayerTraffic:
    """Communication of the layers of ``stage``.

    Tensor, with sequence parallelism: forward, an all-gather before and a reduce-scatter after attention and MLP; backward,
    two all-gathers of output gradients block, while the other four collectives overlap matrix products
    (tensor_parallel/layers.py:512-600). Without: two all-reduces forward; backward, two that overlap matrix products.
    Context: keys and values are gathered, their gradients summed in float32. Pipeline: hidden states and their gradients,
    overlapped under the interleaved schedule. Experts: each token's copies go to the ranks of its experts and back.
    """
    b, t, c = ELEMENT[dtype], layout.tensor, layout.context
    layers, tokens = layout.stages.layers(shape.num_layers)[stage], packs.tokens / c
    unit = layers * tokens * shape.hidden_size * b * (t - 1) / t
    again = {"none": 0, "selective": 2, "full": 4}[layout.recompute]
    tensor_backward = (2 if layout.sequence_parallel else 0) + again
    heads = layers * tokens * (c - 1) * 2 * shape.num_query_groups * shape.head_dim / t
    context_backward = heads * (FLOAT32 + (b if layout.recompute == "full" else 0))
    sends = layout.pipeline > 1 and layout.virtual_pipeline == 1
    hidden = tokens * shape.hidden_size * b / layout.sequence_shards if sends else 0.0
    sent = 0.0
    if shape.experts is not None:
        copies = tokens / layout.sequence_shards * shape.experts.experts_per_token
        sent = 2 * layers * copies * shape.hidden_size * b * (layout.expert - 1) / layout.expert
    experts = (sent, sent * (1 if layout.recompute == "none" else 2))
    return LayerTraffic((4 * unit, tensor_backward * unit), (heads * b, context_backward), experts, (hidden, hidden))


@dataclass(frozen=True)
class StagePasses:
    """Seconds of an update's passes on one rank of a stage. ahead, behind: what it waits for in the two passes, of each kind of
    communication of its layers.
    """

    logprobs: float
    forward: float
    backward: float
    ahead: tuple[float, float, float, float]
    behind: tuple[float, float, float, float]

    @property
    def total(self) -> float:
        return self.forward + self.backward + sum(self.ahead) + sum(self.behind)


@dataclass(frozen=True)
class Roofline:
    """Seconds of work and of communication on one rank of ``layout``."""

    layout: ParallelLayout
    cluster: Cluster
    dtype: str

    def work(self, work: Work) -> float:
        gpu = self.cluster.gpu
        matmul = work.matmul / (gpu.flops_of(self.dtype) * ACHIEVABLE.matmul)
        attention = work.attention / (gpu.flops_of(self.dtype) * ACHIEVABLE.attention)
        return matmul + attention + work.bytes / (gpu.memory_bandwidth * ACHIEVABLE.memory)

    def transfer(self, num_bytes: float, size: int, stride: int) -> float:
        if num_bytes == 0:
            return 0.0
        bandwidth = self.cluster.bandwidth(size, stride)
        inside = bandwidth == self.cluster.gpu.node_bandwidth
        return num_bytes / (bandwidth * (ACHIEVABLE.node if inside else ACHIEVABLE.network))

    def layers(self, moved: LayerTraffic, direction: int) -> tuple[float, float, float, float]:
        """Seconds of tensor, context, expert and pipeline communication; direction 0 is forward, 1 backward."""
        layout = self.layout
        apart = layout.tensor * layout.replicas
        return (
            self.transfer(moved.tensor[direction], layout.tensor, 1),
            self.transfer(moved.context[direction], layout.context, layout.tensor),
            self.transfer(moved.expert[direction], layout.expert, layout.tensor),
            self.transfer(moved.pipeline[direction], 2, apart),
        )

    def passes(self, shape: ModelShape, stage: int, packs: Packs, switches: Switches) -> StagePasses:
        """All packs of an update on ``stage``."""
        layout = self.layout
        work = stage_work(shape, layout, stage, packs, self.dtype, fused_head=switches.fused_head)
        moved = traffic(shape, layout, stage, packs, self.dtype)
        starts = expert_seconds(shape, layout, stage) * packs.num_micro_batches
        again = starts if layout.recompute != "none" else 0.0
        return StagePasses(
            logprobs=self.work(work.logprobs) + starts,
            forward=self.work(work.forward) + starts,
            backward=self.work(work.backward) + 2 * starts + again,
            ahead=self.waits(moved, 0, work.forward, switches),
            behind=self.waits(moved, 1, work.backward, switches),
        )

    def waits(self, moved: LayerTraffic, direction: int, work: Work, switches: Switches) -> tuple[float, float, float, float]:
        """:meth:`layers`. Overlapped tensor communication leaves what the products do not cover, and one piece of each
        collective: a rank's own piece of an all-gather is there before, that of a reduce-scatter comes last.
        """
        tensor, context, expert, pipeline = self.layers(moved, direction)
        if switches.overlapped_tensor:
            tensor = max(tensor / self.layout.tensor, tensor - self.work(Work(matmul=work.matmul)))
        return tensor, context, expert, pipeline


def train_time(
    shape: ModelShape,
    layout: ParallelLayout,
    cluster: Cluster,
    packs: Packs,
    *,
    num_updates: int,
    dtype: str,
    cpu_offload: float,
    switches: Switches = DEFAULTS,
) -> TrainTime:
    """Old log-probs and all updates of a rollout step; each update trains ``packs``."""
    rate = Roofline(layout, cluster, dtype)
    stages = [rate.passes(shape, stage, packs, switches) for stage in range(layout.pipeline)]
    slowest = max(stages, key=lambda stage: stage.total)
    forward, backward, ahead, behind = slowest.forward, slowest.backward, slowest.ahead, slowest.behind
    slots = packs.num_micro_batches * layout.virtual_pipeline
    logprobs = max(stage.logprobs + sum(stage.ahead) for stage in stages)

    on_gpu = cluster.gpu.is_gpu
    numel, fullest = max((stage_numel(shape, layout, stage, on_gpu=on_gpu), stage) for stage in range(layout.pipeline))
    experts = stage_experts(shape, layout, fullest, on_gpu=on_gpu)
    dense, ranks, few = numel - experts, layout.replicas, layout.expert_replicas

    def collective(element: int) -> float:
        """Seconds to gather or sum one value per parameter over the ranks that hold it."""
        whole = rate.transfer(element * dense * (ranks - 1) / ranks, ranks, layout.tensor)
        return whole + rate.transfer(element * experts * (few - 1) / few, few, layout.tensor * layout.expert)

    summing, gathering = collective(FLOAT32), collective(ELEMENT[dtype])
    own = dense / ranks + experts / few
    waited = max(0.0, summing - backward / packs.num_micro_batches)
    hidden = min(gathering, forward / packs.num_micro_batches) if switches.overlapped_gathering else 0.0
    adds = 0.0 if switches.fused_gradients else add_seconds(numel, cluster, dtype)
    return TrainTime(
        old_logprobs=num_updates * logprobs * (1 + (layout.pipeline - 1) / (slots * num_updates)),
        forward=num_updates * forward,
        backward=num_updates * backward,
        tensor_communication=num_updates * (ahead[0] + behind[0]),
        context_communication=num_updates * (ahead[1] + behind[1]),
        expert_communication=num_updates * (ahead[2] + behind[2]),
        pipeline_communication=num_updates * (ahead[3] + behind[3]),
        data_communication=num_updates * (waited + gathering) - (num_updates - 1) * hidden,  # the last is published at once
        pipeline_bubble=num_updates * slowest.total * (layout.pipeline - 1) / slots,
        optimizer=num_updates * optimizer_seconds(numel, own, cluster, dtype, cpu_offload, switches.moment_bytes),
        gradient_adds=num_updates * packs.num_micro_batches * adds,
    )


def expert_seconds(shape: ModelShape, layout: ParallelLayout, stage: int) -> float:
    """What it takes to start the products of the experts of ``stage`` one by one in a forward pass; twice as many backward."""
    if shape.experts is None:
        return 0.0
    return EXPERT_SECONDS * layout.stages.layers(shape.num_layers)[stage] * shape.experts.num_experts / layout.expert


def add_seconds(numel: int, cluster: Cluster, dtype: str) -> float:
    """Add the gradients of one micro-batch to their float32 sums: write and read them, read and write the sums."""
    return numel * 2 * (ELEMENT[dtype] + FLOAT32) / (cluster.gpu.memory_bandwidth * ACHIEVABLE.memory)


def optimizer_seconds(
    numel: int, own: float, cluster: Cluster, dtype: str, cpu_offload: float, moment_bytes: int = 2 * FLOAT32
) -> float:
    """One update: clear gradients and take their norm, read and write the state, fetch and return an offloaded share.

    Args:
        numel: parameters on this rank. own: those whose state it holds.
    """
    gpu, state = cluster.gpu, moment_bytes + (FLOAT32 if dtype == "bfloat16" else 0)
    traffic = FLOAT32 * (2 * numel + own) + own * (2 * state + ELEMENT[dtype])
    over_host = 2 * state * own * cpu_offload
    return traffic / (gpu.memory_bandwidth * ACHIEVABLE.memory) + over_host / (gpu.host_bandwidth * ACHIEVABLE.host)
