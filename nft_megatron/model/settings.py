"""Megatron-Core's settings for a model on one rank, and impossible layouts: all that follows from sizes and topology alone."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from nft_megatron.base.errors import UserError
from nft_megatron.config.kernels import KernelsConfig
from nft_megatron.model.topology import Topology
from nft_megatron.weights.shape import Experts, ModelShape

VOCABULARY_MULTIPLE = 128
"""On CUDA, vocabulary rows per tensor rank are a multiple of this, which keeps matrix products aligned."""

Recompute = Literal["none", "selective", "full"]


def transformer_config(
    shape: ModelShape,
    topology: Topology,
    dtype: torch.dtype,
    sequence_parallel: bool,
    recompute: Recompute,
    variable_lengths: bool,
    kernels: KernelsConfig | None = None,
) -> TransformerConfig:
    """Megatron's settings for this rank; arguments and errors are those of :func:`.build.build_model`."""
    _check_layout(shape, topology, sequence_parallel)
    kernels = kernels or KernelsConfig()
    _check_context(shape, topology, kernels)
    with_engine, on_cuda = _has_transformer_engine(topology, dtype), topology.device.type == "cuda"
    _check_tensor_overlap(shape, kernels, with_engine)
    interleaved = topology.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=topology.tensor_size,
        pipeline_model_parallel_size=topology.pipeline_size,
        virtual_pipeline_model_parallel_size=topology.virtual_pipeline if interleaved else None,
        num_layers_in_first_pipeline_stage=topology.stages.first,
        num_layers_in_last_pipeline_stage=topology.stages.last,
        # Otherwise two stages exchange activations and gradients between the same two ranks in one batch of messages, which are
        # distinguished only by their order (pipeline_parallel/p2p_communication.py:26).
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        context_parallel_size=topology.context_size,
        expert_model_parallel_size=topology.expert_size,
        sequence_parallel=sequence_parallel and topology.tensor_size > 1,
        variable_seq_lengths=variable_lengths,
        # Megatron refuses variable lengths under the default dispatcher even in a model without experts
        # (transformer/transformer_config.py:1828); without them a pipeline over gloo silently delivers wrong shapes.
        moe_token_dispatcher_type="alltoall",
        **_experts(shape.experts),
        use_cpu_initialization=not on_cuda,
        # All weights are loaded; but `perform_initialization=False` would leave `tensor_model_parallel` unset on them.
        init_method=torch.nn.init.zeros_,
        output_layer_init_method=torch.nn.init.zeros_,
        transformer_impl="transformer_engine" if with_engine else "local",
        apply_rope_fusion=with_engine,
        gradient_accumulation_fusion=on_cuda and kernels.gradient_accumulation_fusion and (with_engine or _has_apex()),
        tp_comm_overlap=kernels.overlap_tensor_communication,
        cp_comm_type=kernels.context_communication,  # Transformer Engine's attention alone reads it
        deterministic_mode=kernels.deterministic,
        bias_activation_fusion=on_cuda,
        bias_dropout_fusion=False,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        recompute_modules=["mlp" if shape.experts is None else "moe"],
        calculate_per_token_loss=True,
        finalize_model_grads_func=_finalize,
    )


def _has_apex() -> bool:
    """Whether apex's kernel for gradient accumulation is installed."""
    return find_spec("fused_weight_gradient_mlp_cuda") is not None


def _check_context(shape: ModelShape, topology: Topology, kernels: KernelsConfig) -> None:
    heads = shape.num_query_groups // topology.tensor_size
    if kernels.context_communication == "a2a" and heads % topology.context_size:
        raise UserError(
            "kernels.context_communication",
            "a2a",
            f"divides the {heads} key-value heads of a tensor rank among {topology.context_size} context ranks",
            "choose p2p or all_gather",
        )


def _check_tensor_overlap(shape: ModelShape, kernels: KernelsConfig, with_engine: bool) -> None:
    if kernels.overlap_tensor_communication and (not with_engine or shape.experts is not None):
        raise UserError(
            "kernels.overlap_tensor_communication",
            True,
            "is for the dense layers of Transformer Engine, on a GPU and in bfloat16",
            "set it to false" + ("" if shape.experts else ", or install transformer-engine"),
        )


DETERMINISTIC_SCORES = 1 << 30
"""Attention scores from which Transformer Engine 2.20 has no deterministic cuDNN kernel for packed sequences on Hopper, as its
workspace would be 128 times as large (SM90_DET_FUSED_THD_BWD_MAX_BHSS in attention/dot_product_attention/utils.py)."""


def check_deterministic(config: TransformerConfig, longest: int, pack: int) -> None:
    """Refuse ``kernels.deterministic`` where attention over full packs of ``longest`` sequences would store all its scores."""
    heads = config.num_attention_heads // config.tensor_model_parallel_size
    is_large = heads * pack * longest >= DETERMINISTIC_SCORES  # it counts heads × sequences × longest²
    has_flash = any(find_spec(name) is not None for name in ("flash_attn", "flash_attn_3"))
    if config.deterministic_mode and config.transformer_impl == "transformer_engine" and is_large and not has_flash:
        raise UserError(
            "kernels.deterministic",
            True,
            f"Transformer Engine has no deterministic attention of its own for {heads} heads and packs of {pack} tokens",
            "install flash-attn 2.4.1 or newer, which it then uses, or set it to false",
        )


def _experts(experts: Experts | None) -> dict[str, Any]:
    """Megatron's settings for a mixture of experts: softmax router in float32, no dropped token, no auxiliary loss."""
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.num_experts,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.experts_per_token,
        # softmax over the chosen logits equals softmax over all, rescaled over the chosen to sum to 1
        "moe_router_pre_softmax": not experts.normalise_topk,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
    }


def _check_layout(shape: ModelShape, topology: Topology, sequence_parallel: bool) -> None:
    for what, size in (
        ("attention heads", shape.num_attention_heads),
        ("key-value heads", shape.num_query_groups),
        ("MLP units", shape.ffn_hidden_size if shape.experts is None else shape.experts.ffn_hidden_size),
    ):
        if size % topology.tensor_size:
            raise UserError(
                "parallel.tensor", topology.tensor_size, f"does not divide the model's {size} {what}", "choose a divisor"
            )
    num_experts = 1 if shape.experts is None else shape.experts.num_experts
    if num_experts % topology.expert_size:
        problem = f"does not divide the {num_experts} experts of a layer" if shape.experts else "the model has no experts"
        raise UserError("parallel.expert", topology.expert_size, problem, f"choose a divisor of {num_experts}")
    if shape.experts is not None and topology.tensor_size > 1 and not sequence_parallel:
        raise UserError("parallel.sequence_parallel", False, "experts under tensor parallelism require it", "set it to true")
    topology.stages.layers(shape.num_layers)


def padded_vocab(shape: ModelShape, topology: Topology) -> int:
    """Rows of embedding and LM head over all tensor ranks: ``shape.vocab_size`` rounded up, on CUDA to 128 rows per rank."""
    multiple = 1 if topology.device.type == "cpu" else VOCABULARY_MULTIPLE
    return shape.padded_vocab(multiple * topology.tensor_size)


def _has_transformer_engine(topology: Topology, dtype: torch.dtype) -> bool:
    """Its attention over packed sequences takes 16-bit dtypes alone; a float32 model gets the local layers."""
    return gpt_layer_specs.HAVE_TE and topology.device.type == "cuda" and dtype is not torch.float32


def _finalize(chunks: list[DistributedDataParallel], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """``finalize_model_grads`` without its division by the number of tokens; see "The scale of gradients" in build.py."""
    finalize_model_grads(chunks, None, **kwargs)
