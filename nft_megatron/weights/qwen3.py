"""Qwen3, dense: the pre-norm decoder with RMSNorm over every head's query and key, no biases, and an independent head size."""

from __future__ import annotations

from typing import Any

from nft_megatron.weights.config_json import Config, decoder_config, only, read_decoder
from nft_megatron.weights.decoder import decoder_table
from nft_megatron.weights.shape import ModelShape

ARCHITECTURE = "Qwen3ForCausalLM"
_DEFAULTS = {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768}

table = decoder_table


def shape(config: Config) -> ModelShape:
    """The sizes in a parsed ``config.json``.

    Raises:
        UserError: for a missing or malformed field, and for what this family's table cannot express.
    """
    only(config, "attention_bias", False, "biases are not supported")
    return read_decoder({**_DEFAULTS, **config}, ARCHITECTURE, qk_norm=True)


def hf_config(shape: ModelShape) -> dict[str, Any]:
    """The ``config.json`` of a model of these sizes."""
    return decoder_config(shape, "qwen3")
