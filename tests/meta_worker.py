"""The real model's parameters on every rank of layouts too large for this machine, for tests/model/test_meta.py."""

from dataclasses import asdict, replace

import torch

from nft_megatron.model.meta import meta_ranks
from nft_megatron.plan.layouts import ParallelLayout
from nft_megatron.plan.models import PUBLIC_MODELS
from nft_megatron.weights import ModelShape
from nft_megatron.weights.shape import Experts

TINY = replace(
    PUBLIC_MODELS["Qwen2.5-0.5B"],
    num_layers=8,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=16,
    vocab_size=300,
)
"""Tied; its vocabulary needs padding."""

EXPERTS = replace(
    TINY,
    architecture="Qwen3MoeForCausalLM",
    tied_embeddings=False,
    qkv_bias=False,
    qk_norm=True,
    experts=Experts(num_experts=4, experts_per_token=2, ffn_hidden_size=32, normalise_topk=True),
)


def case(
    shape: ModelShape, tensor: int, pipeline: int, virtual: int, context: int, data: int, expert: int = 1, **ends: int
) -> tuple:
    return shape, ParallelLayout(tensor, pipeline, virtual, context, data, True, "none", 16384, expert, **ends)


CASES = {
    "32B on 64 GPUs": case(PUBLIC_MODELS["Qwen2.5-32B"], 8, 4, 1, 2, 1),
    "32B interleaved": case(PUBLIC_MODELS["Qwen2.5-32B"], 4, 4, 4, 1, 1),
    "32B interleaved, uneven": case(PUBLIC_MODELS["Qwen2.5-32B"], 4, 4, 2, 1, 1, first_stage_layers=16, last_stage_layers=12),
    "7B": case(PUBLIC_MODELS["Qwen2.5-Math-7B"], 2, 2, 1, 1, 2),
    "tiny": case(TINY, 1, 1, 1, 1, 1),
    "tiny, tensor 4": case(TINY, 4, 1, 1, 2, 1),
    "tiny, two stages": case(TINY, 2, 2, 1, 1, 1),
    "tiny, uneven": case(TINY, 1, 3, 1, 1, 1, last_stage_layers=2),
    "tiny, interleaved": case(TINY, 2, 2, 2, 1, 2),
    "experts, tensor 2": case(EXPERTS, 2, 1, 1, 1, 2),
    "experts over 2": case(EXPERTS, 2, 2, 1, 2, 2, 2),
    "experts, uneven": case(EXPERTS, 1, 2, 1, 1, 1, first_stage_layers=5),
}


def count() -> dict[str, list[dict]]:
    """Every rank of every case."""
    return {name: [asdict(rank) for rank in meta_ranks(*each, dtype=torch.bfloat16)] for name, each in CASES.items()}
