"""What the layers of a decoder store for the backward pass, in bytes per token, operator by operator.

*Local*: Megatron's unfused layers with this project's norm and attention, on the CPU. Traced operator by operator: torch's
``rms_norm`` there keeps a float32 copy of its input and the normalised float32 values; SwiGLU keeps gate and up, SiLU of the
gate, up + 0, and the product; the attention keeps q, k, v, output and log-sum-exp, and the output once more as the
projection's input. A test compares it with what autograd saves, to the byte.

*Fused*: Transformer Engine on GPUs (2.x). From reading its code, not measured: norm and linear layer together keep the norm's
input and output; SwiGLU is one kernel that keeps gate and up; q, k, v are kept once, after rotation, and the attention's output
is the projection's input.

Symbols: h hidden, q and kv widths of all query and of all key heads, f MLP units, A query heads, G key-value heads, t tensor
ranks, s of them over which the sequence is split (t or 1), b bytes per element.
"""

from __future__ import annotations

from dataclasses import dataclass

from nft_megatron.plan.layouts import ParallelLayout
from nft_megatron.weights import ModelShape

FLOAT32 = 4


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one layer and one token on this rank.

    entry: the layer's input. attention: stored by the first norm and the attention. mlp_entry: the input of the MLP half.
    mlp: stored inside it.
    """

    entry: float
    attention: float
    mlp_entry: float
    mlp: float

    @property
    def everything(self) -> float:
        return self.attention + self.mlp_entry + self.mlp

    def kept(self, recompute: str) -> float:
        """Bytes that live from the forward to the backward pass under ``model.recompute``."""
        return {"none": self.everything, "selective": self.everything - self.mlp, "full": self.entry}[recompute]

    def made_again(self, recompute: str) -> float:
        """Bytes that the backward pass of one layer recomputes before using them."""
        return {"none": 0.0, "selective": self.mlp, "full": self.everything}[recompute]


def layer_bytes(shape: ModelShape, layout: ParallelLayout, element: int, *, fused: bool) -> LayerBytes:
    """What a layer stores per token; ``element`` is b."""
    h, f, heads, groups = shape.hidden_size, shape.ffn_hidden_size, shape.num_attention_heads, shape.num_query_groups
    q, kv = heads * shape.head_dim, groups * shape.head_dim
    t, s, b = layout.tensor, layout.sequence_shards, element
    statistics = FLOAT32 * heads / t  # log-sum-exp
    head_norms = FLOAT32 * (heads + groups) / t if shape.qk_norm else 0.0  # 1/rms of every query and key
    normed = (q + kv) / t if shape.qk_norm else 0.0
    if fused:
        norm_input, norm_rest = b * h / s, (b * h + FLOAT32) / s
        attention = b * (2 * q + 2 * kv) / t + statistics + b * normed + head_norms
        mlp = b * 3 * f / t if shape.experts is None else _expert_bytes(shape, layout, b, fused=True)
        return LayerBytes(b * h / s, norm_input + norm_rest + attention, norm_input, norm_rest + mlp)
    norm = (2 * FLOAT32 * h + FLOAT32 + b * h) / s
    # Every key that a context rank's queries see is stored: of 2c chunks, those up to its first and up to its second.
    seen = layout.context + 0.5 if layout.context > 1 else 1.0
    attention = b * (3 * q + 2 * kv * seen) / t + statistics
    attention += 2 * FLOAT32 * normed + head_norms  # the norms' outputs are rotated into new tensors and not kept
    mlp = b * 5 * f / t if shape.experts is None else _expert_bytes(shape, layout, b, fused=False)
    return LayerBytes(b * h / s, norm + attention, norm, mlp)


def _expert_bytes(shape: ModelShape, layout: ParallelLayout, element: int, *, fused: bool) -> float:
    """Inside a mixture of experts per token, if all experts get equally many.

    The router's float32 probabilities and a mask; for each of k experts the token as its input, which is gathered over the
    tensor ranks, its place and its probability, and what a dense MLP stores (*local*: also the product before its scaling).
    """
    experts = shape.experts
    assert experts is not None
    k, f, h, b = experts.experts_per_token, experts.ffn_hidden_size, shape.hidden_size, element
    places = ((FLOAT32 + 1) * experts.num_experts + 24 * k) / layout.sequence_shards
    return places + k * (b * h + b * (3 if fused else 6) * f / layout.tensor)


def final_norm_bytes(shape: ModelShape, layout: ParallelLayout, element: int, *, fused: bool) -> float:
    """Bytes per token stored by the norm after the last layer."""
    h, s = shape.hidden_size, layout.sequence_shards
    return ((element if fused else 2 * FLOAT32) * h + FLOAT32) / s
