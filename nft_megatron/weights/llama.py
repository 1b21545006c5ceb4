"""Llama 2 and 3: the pre-norm decoder without biases; from 3.1 on with "llama3" rotary scaling."""

from __future__ import annotations

from typing import Any

from nft_megatron.weights.config_json import Config, decoder_config, only, read_decoder
from nft_megatron.weights.decoder import decoder_table
from nft_megatron.weights.shape import ModelShape

ARCHITECTURE = "LlamaForCausalLM"
_DEFAULTS = {"max_position_embeddings": 2048}

table = decoder_table


def shape(config: Config) -> ModelShape:
    """The sizes in a parsed ``config.json``.

    Raises:
        UserError: for a missing or malformed field, and for what this family's table cannot express.
    """
    for field in ("attention_bias", "mlp_bias"):
        only(config, field, False, "biases are not supported")
    return read_decoder({**_DEFAULTS, **config}, ARCHITECTURE)


def hf_config(shape: ModelShape) -> dict[str, Any]:
    """The ``config.json`` of a model of these sizes."""
    return decoder_config(shape, "llama")
