"""Peak memory of a rank, by component, while training on full packs.

    peak = parameters + gradients + optimizer + activations + max(working, LM head) + runtime

Parameters are exact, as the real model on the meta device shows for every rank (tests/model/test_meta.py); gradients and
optimizer are exact up to Megatron's padding of its buffers; the rest are estimates. On the CPU, where it can be measured, the
peak is right to within a few percent (benchmarks/plan_memory.py). Ranks of one pipeline stage are alike, so there is one figure
per stage.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from nft_megatron.plan.activations import FLOAT32, final_norm_bytes, layer_bytes
from nft_megatron.plan.layouts import ParallelLayout
from nft_megatron.plan.switches import DEFAULTS, Switches
from nft_megatron.weights import ModelShape, weight_table

VOCABULARY_MULTIPLE = 128
"""Vocabulary rows per tensor rank on a GPU are a multiple of this, as in model/build.py."""

LOGITS_BYTES, MIN_CHUNK = 300 * 2**20, 512
BLOCK_BYTES = {False: 2**22, True: 2**28}
"""Logits per chunk, fewest tokens per chunk, and float32 temporaries on CPU and GPU, as in model/lm_head.py."""

GPU_RUNTIME = 4e9
CPU_RUNTIME = 4e7
"""Assumed memory of the libraries. GPU: CUDA context, workspaces, NCCL's buffers for about ten groups. CPU: as observed."""

OVERLAP_BUFFERS = 12
"""Hidden states of a pack that Transformer Engine 2.20 holds for overlapped tensor-parallel communication: one for each matrix
product in its initialize_ub (pytorch/module/base.py)."""

FIT, UPDATE_FIT = 0.9, 0.95
"""Share of a device's memory that a plan may use in the passes and in the update. The rest covers errors of the estimates and
fragmentation; an update has few of the former and, without activations, little of the latter."""

ELEMENT = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of a pipeline stage.

    optimizer: on the device during the update; otherwise, while activations live, ``offloaded`` of it is on the host.
    working: what the backward pass of one layer holds in addition, including recomputation. lm_head: the hidden states at loss
    positions and their gradients, and a chunk of logits; only on the last stage. summing: what summing the ranks' gradients
    needs.
    """

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    offloaded: int
    activations: float
    working: float
    lm_head: float
    summing: float
    runtime: float

    @property
    def passes(self) -> float:
        """Total in a backward pass, or while gradients are summed: mostly estimates."""
        backward = self.activations + max(self.working, self.lm_head)
        return self.update - self.offloaded + max(backward, self.summing)

    @property
    def update(self) -> float:
        """Total in the optimizer's update, when no activations live: exact but for ``runtime``."""
        return self.parameters + self.gradients + self.runtime + self.optimizer

    @property
    def peak(self) -> float:
        """The largest total."""
        return max(self.passes, self.update)

    @property
    def demand(self) -> float:
        """The memory that a device must have: ``passes`` may take 90 % of it, ``update`` 95 %."""
        return max(self.passes / FIT, self.update / UPDATE_FIT)


def padded_vocab(shape: ModelShape, tensor: int, *, on_gpu: bool) -> int:
    """Rows of embedding and LM head over all tensor ranks."""
    return shape.padded_vocab((VOCABULARY_MULTIPLE if on_gpu else 1) * tensor)


@functools.lru_cache(maxsize=64)
def _numel_by_part(shape: ModelShape, tensor: int, vocab: int) -> dict[str | int, int]:
    """Elements per tensor rank of the embedding, each layer by number, the final norm and the LM head. Layers are without their
    experts: "experts" is all those of one layer.
    """
    parts: dict[str | int, int] = {}
    for entry in weight_table(shape).entries:
        words = entry.name.split(".")
        part = int(words[2]) if entry.name.startswith("decoder.layers.") else words[0] if words[0] != "decoder" else words[1]
        if entry.expert is not None:
            part = "experts" if part == 0 else "experts of other layers, which are alike"
        parts[part] = parts.get(part, 0) + math.prod(entry.local_shape(tensor, vocab))
    return parts


def stage_experts(shape: ModelShape, layout: ParallelLayout, stage: int, *, on_gpu: bool) -> int:
    """Parameters of experts on each rank of a stage; 0 in a dense model."""
    parts = _numel_by_part(shape, layout.tensor, padded_vocab(shape, layout.tensor, on_gpu=on_gpu))
    return layout.stages.layers(shape.num_layers)[stage] * parts.get("experts", 0) // layout.expert


def stage_numel(shape: ModelShape, layout: ParallelLayout, stage: int, *, on_gpu: bool) -> int:
    """Parameters on each rank of a stage. A tied LM head is a second copy if the last stage is not the first."""
    parts = _numel_by_part(shape, layout.tensor, padded_vocab(shape, layout.tensor, on_gpu=on_gpu))
    first, last = stage == 0, stage == layout.pipeline - 1
    total = sum(parts[layer] for layer in range(shape.num_layers) if layout.stages.stage_of(layer, shape.num_layers) == stage)
    total += parts["embedding"] if first else 0
    total += parts["final_layernorm"] if last else 0
    total += stage_experts(shape, layout, stage, on_gpu=on_gpu)
    return total + (parts["output_layer"] if last and not (first and shape.tied_embeddings) else 0)


def stage_memory(
    shape: ModelShape,
    layout: ParallelLayout,
    stage: int,
    *,
    dtype: str,
    on_gpu: bool,
    num_micro_batches: int,
    cpu_offload: float = 0.0,
    switches: Switches = DEFAULTS,
) -> StageMemory:
    """Memory of a rank of ``stage`` at its peak.

    Args:
        dtype: of weights and activations, "bfloat16" or "float32".
        on_gpu: with Transformer Engine's operators; otherwise the local ones.
        num_micro_batches: of an update; fewer than pipeline stages store fewer activations.
        cpu_offload: share of the optimizer's state on the host.
        switches: moments in fewer bits, buffers of overlapped communication, temporaries of an LM head without kernels.
    """
    b, h, t = ELEMENT[dtype], shape.hidden_size, layout.tensor
    numel = stage_numel(shape, layout, stage, on_gpu=on_gpu)
    tokens = layout.local_tokens
    is_last = stage == layout.pipeline - 1
    experts = stage_experts(shape, layout, stage, on_gpu=on_gpu)
    own = math.ceil((numel - experts) / layout.replicas) + math.ceil(experts / layout.expert_replicas)
    state = own * (switches.moment_bytes + (0 if dtype == "float32" else FLOAT32))

    layer = layer_bytes(shape, layout, b, fused=on_gpu)
    layers = layout.stages.layers(shape.num_layers)[stage]
    output = 0.0 if is_last else b * h / layout.sequence_shards  # kept by the schedule until its gradient arrives
    in_flight = layout.in_flight(stage, num_micro_batches)
    kept = in_flight * (layers * layer.kept(layout.recompute) + output)
    if is_last:
        kept += final_norm_bytes(shape, layout, b, fused=on_gpu)

    units = shape.ffn_hidden_size if shape.experts is None else shape.experts.ffn_hidden_size
    copies = 1 if shape.experts is None else shape.experts.experts_per_token
    largest_weight = _weight_gradient(2 * units * h / t, b, on_gpu)  # gate and up
    gradients = copies * (b * (3 if on_gpu else 2) * units / t + b * 2 * h)
    received = 2 * b * h / layout.sequence_shards if layout.pipeline > 1 else 0.0
    working = tokens * (layer.made_again(layout.recompute) + gradients + received) + largest_weight
    buffers = OVERLAP_BUFFERS * b * h * tokens if switches.overlapped_tensor else 0
    return StageMemory(
        stage=stage,
        parameters=b * numel,
        gradients=FLOAT32 * numel,
        optimizer=state,
        offloaded=round(state * cpu_offload),
        activations=tokens * kept,
        working=working,
        lm_head=lm_head_bytes(shape, layout, dtype, on_gpu=on_gpu, fused=switches.fused_head) if is_last else 0.0,
        summing=0.0 if on_gpu else FLOAT32 * numel,  # gloo sums into a copy of the whole buffer
        runtime=(GPU_RUNTIME if on_gpu else CPU_RUNTIME) + buffers,
    )


def lm_head_bytes(shape: ModelShape, layout: ParallelLayout, dtype: str, *, on_gpu: bool, fused: bool = True) -> float:
    """Held by the LM head for a full pack in which every position carries a loss. Its kernels need no temporaries."""
    b, tokens = ELEMENT[dtype], layout.local_tokens
    rows = padded_vocab(shape, layout.tensor, on_gpu=on_gpu) // layout.tensor
    chunk = max(1, LOGITS_BYTES // (rows * b * MIN_CHUNK)) * MIN_CHUNK
    logits = min(chunk, tokens) * rows * b + (0 if on_gpu and fused else 2 * BLOCK_BYTES[on_gpu])
    hidden = b * shape.hidden_size * tokens
    afterwards = 2 * hidden + _weight_gradient(rows * shape.hidden_size, b, on_gpu)  # autograd's own gradient is a zero
    return 2 * hidden + max(logits, afterwards)


def _weight_gradient(numel: float, element: int, on_gpu: bool) -> float:
    """Bytes of a weight's gradient until it is in the float32 sum; adding it needs a float32 copy on the CPU."""
    return numel * (element + (FLOAT32 if element < FLOAT32 and not on_gpu else 0))
