"""The sizes of a decoder-only model: what a family's file reads from ``config.json``, and all that building the model needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Llama3Scaling:
    """How Llama 3.1 and later stretch rotary positions; see :func:`nft_megatron.weights.rotary.inverse_frequencies`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in every layer: a router sends each token to ``experts_per_token`` of ``num_experts`` gated MLPs.

    ``normalise_topk``: scale the chosen experts' router probabilities to sum to 1.

    >>> Experts(num_experts=128, experts_per_token=8, ffn_hidden_size=768, normalise_topk=True).num_experts
    128
    """

    num_experts: int
    experts_per_token: int
    ffn_hidden_size: int
    normalise_topk: bool


@dataclass(frozen=True)
class ModelShape:
    """What building the model needs. All sizes are those of the whole model; ``vocab_size`` is without padding.

    ``ffn_hidden_size`` is that of a dense MLP; with ``experts`` no layer has one. ``qkv_bias``: the query, key and
    value projections have a bias; no other linear layer ever has. ``qk_norm``: RMSNorm over each head's query and key.

    >>> SHAPE_EXAMPLE.num_attention_heads * SHAPE_EXAMPLE.head_dim == SHAPE_EXAMPLE.hidden_size
    True
    """

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    norm_epsilon: float
    rope_theta: float
    max_positions: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool = False
    rope_scaling: Llama3Scaling | None = None
    experts: Experts | None = None

    def padded_vocab(self, multiple: int) -> int:
        """The vocabulary rounded up to a multiple, so that every tensor rank holds the same number of rows.

        >>> SHAPE_EXAMPLE.padded_vocab(128)
        151936
        """
        return -(-self.vocab_size // multiple) * multiple


SHAPE_EXAMPLE = ModelShape(
    architecture="Qwen2ForCausalLM",
    num_layers=28,
    hidden_size=3584,
    ffn_hidden_size=18944,
    num_attention_heads=28,
    num_query_groups=4,
    head_dim=128,
    vocab_size=151936,
    norm_epsilon=1e-6,
    rope_theta=1_000_000.0,
    max_positions=32768,
    tied_embeddings=False,
    qkv_bias=True,
)
"""Qwen2.5-7B."""
