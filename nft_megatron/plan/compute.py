"""Work of a training step on one rank: FLOPs, exactly for dense layers and causal attention, and bytes of the small operators.

A matrix product of a [T, n] with an [n, m] matrix is 2·T·n·m FLOPs, its backward pass twice as much. Causal attention over a
sequence of s tokens has s(s + 1)/2 pairs of tokens, each 4·d FLOPs per head (scores and weighted sum); its backward pass is 2.5
times as much, because the kernels recompute the scores. A test checks this with torch's own counter on the real model.
"""

from __future__ import annotations

from dataclasses import dataclass

from nft_megatron.plan.layouts import ParallelLayout
from nft_megatron.plan.memory import ELEMENT
from nft_megatron.plan.workload import Packs
from nft_megatron.weights import ModelShape, num_parameters


@dataclass(frozen=True)
class Work:
    """FLOPs of matrix products, FLOPs of attention, and bytes that memory-bound operators read and write."""

    matmul: float = 0.0
    attention: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.matmul + other.matmul, self.attention + other.attention, self.bytes + other.bytes)

    def scaled(self, factor: float) -> Work:
        return Work(self.matmul * factor, self.attention * factor, self.bytes * factor)

    @property
    def flops(self) -> float:
        return self.matmul + self.attention


def attention_elements(shape: ModelShape) -> int:
    """Elements of a layer's attention matrices: q, k, v and the output projection."""
    q, kv = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    return shape.hidden_size * (2 * q + 2 * kv)


def mlp_elements(shape: ModelShape) -> int:
    """Elements that a token meets in a layer's MLP: gate, up and down; of experts those that it is sent to, and the router."""
    if shape.experts is None:
        return 3 * shape.hidden_size * shape.ffn_hidden_size
    experts = shape.experts
    return shape.hidden_size * (3 * experts.experts_per_token * experts.ffn_hidden_size + experts.num_experts)


def expert_parameters(shape: ModelShape) -> int:
    """Parameters of all experts; 0 in a dense model."""
    experts = shape.experts
    return 3 * shape.num_layers * experts.num_experts * shape.hidden_size * experts.ffn_hidden_size if experts else 0


def active_parameters(shape: ModelShape) -> float:
    """Parameters that a token meets: of the experts only those that it is sent to."""
    total, experts = num_parameters(shape), shape.experts
    return total - (expert_parameters(shape) * (1 - experts.experts_per_token / experts.num_experts) if experts else 0)


def attention_part(shape: ModelShape, tokens: float, pairs: float, element: int) -> Work:
    """Forward pass of the attention half of one layer, including norm and residual, on one device."""
    h, q, kv = shape.hidden_size, shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    return Work(
        matmul=2 * tokens * attention_elements(shape),
        attention=4 * shape.num_attention_heads * shape.head_dim * pairs,
        bytes=element * tokens * (5 * h + 2 * (q + kv)),  # norm reads and writes, residual twice in and once out, rotation
    )


def mlp_part(shape: ModelShape, tokens: float, element: int) -> Work:
    """Forward pass of the MLP half of one layer."""
    values = 5 * shape.hidden_size + 3 * shape.ffn_hidden_size
    if shape.experts is not None:  # every copy of a token is written for its expert, and its output read back
        copies = shape.experts.experts_per_token
        values = 5 * shape.hidden_size + copies * (4 * shape.hidden_size + 3 * shape.experts.ffn_hidden_size)
    return Work(matmul=2 * tokens * mlp_elements(shape), bytes=element * tokens * values)


def layer_passes(shape: ModelShape, tokens: float, pairs: float, element: int, recompute: str) -> tuple[Work, Work]:
    """Forward pass of a layer, and backward pass including recomputation."""
    attention, mlp = attention_part(shape, tokens, pairs, element), mlp_part(shape, tokens, element)
    forward = attention + mlp
    again = {"none": Work(), "selective": mlp, "full": forward}[recompute]
    return forward, Work(2 * forward.matmul, 2.5 * forward.attention, 2 * forward.bytes) + again


def head_passes(shape: ModelShape, positions: float, element: int, *, fused: bool = True) -> tuple[Work, Work, Work]:
    """The LM head at ``positions``: for old log-probs with their entropy, and in an update forward and backward.

    Products write and read each logit. Between them it is read for the sums, read for its gradient and written as that: in
    kernels, or in passes over float32 temporaries as tests/model/test_lm_head_kernels.py counts them.
    """
    product, logits = 2.0 * positions * shape.hidden_size * shape.vocab_size, positions * shape.vocab_size
    between = (0, 0, 0) if fused else (32 + element, 16 + element, 24)
    with_entropy, without, gradient = (each + more for each, more in zip((element, element, 2 * element), between, strict=True))
    return (
        Work(product, 0.0, (element + with_entropy) * logits),
        Work(product, 0.0, (element + without) * logits),
        Work(2 * product, 0.0, (gradient + 2 * element) * logits),
    )


@dataclass(frozen=True)
class StageWork:
    """All packs of an update on one rank of a stage: the log-prob pass, and the update's two passes."""

    logprobs: Work
    forward: Work
    backward: Work


def stage_work(
    shape: ModelShape, layout: ParallelLayout, stage: int, packs: Packs, dtype: str, *, fused_head: bool = True
) -> StageWork:
    """The share of ``packs`` on one rank of ``stage``: context ranks split tokens, tensor ranks heads and MLP units."""
    b, share = ELEMENT[dtype], 1 / (layout.tensor * layout.context)
    layers = layout.stages.layers(shape.num_layers)[stage]
    forward, backward = layer_passes(shape, packs.tokens, packs.pairs, b, layout.recompute)
    parts = [work.scaled(layers * share) for work in (forward, forward, backward)]
    if stage == layout.pipeline - 1:
        head = head_passes(shape, packs.positions, b, fused=fused_head)
        parts = [part + of_head.scaled(share) for part, of_head in zip(parts, head, strict=True)]
    return StageWork(*parts)


def model_flops(shape: ModelShape, tokens: float, pairs: float, positions: float) -> float:
    """FLOPs of the model itself: a backward pass counts as two forward passes, without recomputation."""
    forward = attention_part(shape, tokens, pairs, 0) + mlp_part(shape, tokens, 0)
    return 3 * (shape.num_layers * forward.flops + 2 * positions * shape.hidden_size * shape.vocab_size)
