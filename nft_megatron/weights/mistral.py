"""Mistral, dense and without a sliding window (7B from v0.3 on, Nemo, Small): the pre-norm decoder without biases."""

from __future__ import annotations

from typing import Any

from nft_megatron.weights.config_json import Config, decoder_config, only, read_decoder
from nft_megatron.weights.decoder import decoder_table
from nft_megatron.weights.shape import ModelShape

ARCHITECTURE = "MistralForCausalLM"
_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}

table = decoder_table


def shape(config: Config) -> ModelShape:
    """The sizes in a parsed ``config.json``.

    Raises:
        UserError: for a missing or malformed field, and for what this family's table cannot express.
    """
    config = {**_DEFAULTS, **config}
    only(config, "sliding_window", None, "sliding-window attention is not supported")
    return read_decoder(config, ARCHITECTURE)


def hf_config(shape: ModelShape) -> dict[str, Any]:
    """The ``config.json`` of a model of these sizes."""
    return decoder_config(shape, "mistral") | {"sliding_window": None}
