"""Qwen3-MoE (30B-A3B, 235B-A22B): Qwen3's attention, with a mixture of experts instead of the MLP in every layer."""

from __future__ import annotations

from typing import Any

from nft_megatron.base.errors import UserError
from nft_megatron.weights.config_json import Config, decoder_config, flag, only, positive_int, read_decoder, refusal
from nft_megatron.weights.decoder import decoder_table
from nft_megatron.weights.shape import Experts, ModelShape

ARCHITECTURE = "Qwen3MoeForCausalLM"
_DEFAULTS = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}

table = decoder_table


def shape(config: Config) -> ModelShape:
    """The sizes in a parsed ``config.json``.

    Raises:
        UserError: for a missing or malformed field, and for what this family's table cannot express.
    """
    config = {**_DEFAULTS, **config}
    only(config, "attention_bias", False, "biases are not supported")
    only(config, "decoder_sparse_step", 1, "every layer must have experts")
    only(config, "mlp_only_layers", [], "every layer must have experts")
    only(config, "shared_expert_intermediate_size", 0, "shared experts are not supported")
    count = "num_local_experts" if "num_local_experts" in config else "num_experts"  # transformers 5 writes the first
    experts = Experts(
        num_experts=positive_int(config, count),
        experts_per_token=positive_int(config, "num_experts_per_tok"),
        ffn_hidden_size=positive_int(config, "moe_intermediate_size"),
        normalise_topk=flag(config, "norm_topk_prob"),
    )
    if experts.experts_per_token > experts.num_experts:
        raise refusal("num_experts_per_tok", experts.experts_per_token, f"exceeds the {experts.num_experts} experts")
    return read_decoder(config, ARCHITECTURE, qk_norm=True, experts=experts)


def hf_config(shape: ModelShape) -> dict[str, Any]:
    """The ``config.json`` of a model of these sizes."""
    experts = shape.experts
    if experts is None:
        raise UserError("experts", None, f"{ARCHITECTURE} has experts in every layer", "name another family")
    return decoder_config(shape, "qwen3_moe") | {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.ffn_hidden_size,
        "norm_topk_prob": experts.normalise_topk,
    }
