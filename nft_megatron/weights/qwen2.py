"""Qwen2 and Qwen2.5: the pre-norm decoder with a bias on q, k and v only; LM head tied to the embedding in the small sizes."""

from __future__ import annotations

from typing import Any

from nft_megatron.weights.config_json import Config, decoder_config, read_decoder
from nft_megatron.weights.decoder import decoder_table
from nft_megatron.weights.shape import ModelShape

ARCHITECTURE = "Qwen2ForCausalLM"
_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768}

table = decoder_table


def shape(config: Config) -> ModelShape:
    """The sizes in a parsed ``config.json``.

    Raises:
        UserError: for a missing or malformed field, and for what this family's table cannot express.
    """
    return read_decoder({**_DEFAULTS, **config}, ARCHITECTURE, qkv_bias=True)


def hf_config(shape: ModelShape) -> dict[str, Any]:
    """The ``config.json`` of a model of these sizes."""
    return decoder_config(shape, "qwen2")
