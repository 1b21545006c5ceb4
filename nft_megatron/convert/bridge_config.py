"""The ``run_config.yaml`` by which Megatron-Bridge builds the model of a checkpoint (0.3 and 0.6: training/model_load_save.py).

Section ``model`` is its ``GPTModelProvider``: fields of Megatron-Core's ``TransformerConfig`` and of Megatron-Bridge's own
(models/gpt_provider.py). What is not named keeps its default; parallel sizes are the loader's.
"""

from __future__ import annotations

from typing import Any

from nft_megatron.config.yaml import dump_yaml
from nft_megatron.weights.shape import Experts, ModelShape

RUN_CONFIG = "run_config.yaml"
_OF_MEGATRON = (1.0, 4.0, 8192)
"""Llama 3's scaling as Megatron-Core has it: only the factor can be chosen (embeddings/rotary_pos_embedding.py)."""


def run_config(shape: ModelShape, dtype: str) -> bytes | None:
    """The file for a model with weights of ``dtype``; None for one whose scaling of positions Megatron-Core cannot express.

    >>> from nft_megatron.weights.shape import SHAPE_EXAMPLE
    >>> print(run_config(SHAPE_EXAMPLE, "bfloat16").decode()[:108])
    model:
      _target_: megatron.bridge.models.gpt_provider.GPTModelProvider
      num_layers: 28
      hidden_size: 3584
    """
    scaling = shape.rope_scaling
    if scaling and (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_positions) != _OF_MEGATRON:
        return None
    model = {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "should_pad_vocab": False,
        "seq_length": shape.max_positions,
        "share_embeddings_and_output_weights": shape.tied_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": int(shape.rope_theta) if shape.rope_theta.is_integer() else shape.rope_theta,
        "rope_scaling": scaling is not None,
        "rope_scaling_factor": scaling.factor if scaling else 1.0,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": _named("torch.nn.functional.silu"),
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **(_experts(shape.experts) if shape.experts else {}),
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "params_dtype": _named(f"torch.{dtype}"),
    }
    return dump_yaml({"model": model}).encode()


def _experts(experts: Experts) -> dict[str, Any]:
    return {
        "num_moe_experts": experts.num_experts,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.experts_per_token,
        "moe_router_pre_softmax": not experts.normalise_topk,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
    }


def _named(name: str) -> dict[str, Any]:
    """An object itself, not what calling it returns."""
    return {"_target_": name, "_call_": False}
