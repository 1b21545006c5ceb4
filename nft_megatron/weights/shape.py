"""The sizes of a decoder-only model, read from a Hugging Face ``config.json`` by the family's file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nft_megatron.errors import UserError


@dataclass(frozen=True)
class ModelShape:
    """What it takes to build the model. All sizes are those of the whole model; ``vocab_size`` is without padding."""

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


def positive_int(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    """A whole number > 0 of a ``config.json``; ``default`` where it is absent or null.

    Raises:
        UserError: naming the field when it is something else, or absent without a default.
    """
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(
            f"config.json: {field}", value, "must be a whole number above 0", "check that the model folder is complete"
        )
    return value
