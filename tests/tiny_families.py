"""A small random model of every family, built by transformers' own classes; a new family is one line here.

Sizes expose mistakes: a head size other than hidden / heads if the family allows it, a vocabulary that needs padding, norms and
biases far from 1 and 0, and "llama3" scaling whose three bands all occur within 128 positions.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB, LAYERS = 131, 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}

FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel], dict[str, Any]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"rope_theta": 5000.0}),
    "qwen2 tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 12, "rope_theta": 1e6}),
    "qwen3 tied": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 12, "tie_word_embeddings": True}),
    "llama 2": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 8}),
    "llama 3": (LlamaConfig, LlamaForCausalLM, {"head_dim": 8, "rope_theta": 5000.0, "rope_scaling": LLAMA3}),
    "llama 3 tied": (LlamaConfig, LlamaForCausalLM, {"head_dim": 8, "rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 8, "sliding_window": None}),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"head_dim": 12, **EXPERTS}),
    "qwen3_moe raw": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"head_dim": 12, **EXPERTS, "norm_topk_prob": False}),
}
DENSE = [name for name in FAMILIES if "moe" not in name]


def tiny_config(name: str) -> PreTrainedConfig:
    config_class, model_class, changes = FAMILIES[name]
    config = config_class(**copy.deepcopy({**SIZES, **changes}))  # transformers modifies the rotary fields it is given
    config.architectures = [model_class.__name__]
    return config


def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = FAMILIES[name][1](tiny_config(name))
    model.set_experts_implementation("eager")  # the faster ones do not support float64
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        elif parameter_name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype)


def save_tiny(name: str, folder: Path) -> Path:
    """Write ``config.json`` and weights, under the names used in files; return the folder."""
    tiny_model(name).save_pretrained(folder)
    return folder
