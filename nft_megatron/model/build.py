"""From the sizes of a model to this rank's part of it: Megatron-Core's ``GPTModel`` inside ``DistributedDataParallel``.

    shape = read_shape(folder)
    chunks = build_model(shape, topology, dtype=torch.float32)
    load_weights(chunks, topology, shape, folder)

    def forward_step(data_iterator, chunk):                      # one micro-batch; called by Megatron's pipeline schedule
        micro_batch = next(data_iterator)
        packed = pack_sequences(lengths, topology.device, topology.context_rank, topology.context_size)
        hidden_NH = chunk(input_ids_1T, position_ids_1T, packed, loss_positions_N)
        def loss_function(hidden_NH):                            # called where the model ends only
            loss = ...                                           # from hidden_NH and lm_head_weight(chunk)
            return loss, NO_TOKEN_COUNT, statistics
        return hidden_NH, loss_function

    zero_gradients(chunks)
    run_schedule(chunks, forward_step, micro_batches, forward_only=False)

**Parts.** A pipeline stage holds one part of the model, or under the interleaved schedule several, each a chunk of the list:
part v of stage p is number v · stages + p of the model's parts, all of them with equally many layers.

**The scale of gradients.** After the schedule, ``parameter.main_grad`` is the plain sum of d(loss)/d(parameter) over the
micro-batches of all data-parallel and context-parallel ranks. Nothing divides it: ``calculate_per_token_loss`` sets DDP's
scaling factor to 1 (distributed/distributed_data_parallel.py:257) and, with a three-tuple from the loss function, keeps the
schedule from dividing by the number of micro-batches (pipeline_parallel/schedules.py:262); ``_finalize`` withholds the token
count by which ``finalize_model_grads`` would divide. So a loss carries its own denominator. The same function adds up what
several ranks hold a part of: norm weights under sequence parallelism, and the tied embedding of the first and last pipeline
stage. With the distributed optimizer a rank's sum is complete only on its own shard of the buffer.

Shapes: T tokens of the pack on this context rank (divisible by the tensor size under sequence parallelism), N of its positions
that carry a loss, H hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from nft_megatron.errors import UserError
from nft_megatron.model.attention import PackedAttention, PackedSequences, rotary_cos_sin
from nft_megatron.model.topology import Topology
from nft_megatron.weights.rotary import inverse_frequencies
from nft_megatron.weights.shape import Experts, ModelShape

# transformer/moe/moe_utils.py:1192 asks whether this is None; where Transformer Engine is absent nobody has defined it.
vars(moe_utils).setdefault("te_general_gemm", None)

VOCABULARY_MULTIPLE = 128
"""Rows of the vocabulary on a tensor rank are a multiple of this on CUDA, where it keeps matrix products aligned."""

NO_TOKEN_COUNT = torch.tensor(0, dtype=torch.int)
"""Second item that a loss function returns: see "The scale of gradients"."""

Chunks = list[DistributedDataParallel]
Recompute = Literal["none", "selective", "full"]
ForwardStep = Callable[[Iterator[Any], torch.nn.Module], tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Any]]]]


class RMSNorm(torch.nn.Module):
    """RMSNorm whose weight Megatron's gradient finalisation recognises under sequence parallelism.

    Megatron's own for the local spec refuses sequence parallelism (transformer/torch_norm.py:32).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.epsilon = eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden, self.weight.shape, self.weight, self.epsilon)


class PolicyModel(GPTModel):
    """A ``GPTModel`` over packed sequences that stops after the final norm, at the positions that carry a loss.

    Logits are left to the caller (with :func:`lm_head_weight`): they are wanted in chunks, and never all at once.
    """

    def __init__(self, shape: ModelShape, **settings: Any) -> None:
        super().__init__(**settings)
        frequencies = inverse_frequencies(shape)
        if self.position_embedding_type == "rope":  # Transformer Engine's attention expects Megatron's own rotary positions
            self.rotary_pos_emb.inv_freq = frequencies.to(self.rotary_pos_emb.inv_freq.device)
        else:
            self.register_buffer("rotary_frequencies", frequencies, persistent=False)

    def forward(  # type: ignore[override]
        self, input_ids_1T: Tensor, position_ids_1T: Tensor, packed: PackedSequences, loss_positions_N: Tensor
    ) -> Tensor:
        """One pipeline stage of one micro-batch.

        Every tensor rank and every stage of a data-parallel rank passes the same arguments; context ranks pass their shares.

        Returns:
            Where the model ends ``[N, H]``, complete on every tensor rank; the backward adds up the ranks' gradients. On others
            the hidden states for the next stage, ``[T, 1, H]``, or this rank's ``T / tensor size`` of them under sequence
            parallelism.
        """
        hidden = self.embedding(input_ids_1T, position_ids_1T) if self.pre_process else None
        frequencies = None
        if self.position_embedding_type == "rope":
            frequencies = self.rotary_pos_emb(self.max_sequence_length, packed_seq=True)
        else:
            cos_T1D, sin_T1D = rotary_cos_sin(position_ids_1T[0], self.rotary_frequencies, self.config.params_dtype)
            packed = dataclasses.replace(packed, cos_T1D=cos_T1D, sin_T1D=sin_T1D)
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=frequencies, packed_seq_params=packed)
        return self._at_loss_positions(hidden, loss_positions_N) if self.post_process else hidden

    def _at_loss_positions(self, hidden: Tensor, loss_positions_N: Tensor) -> Tensor:
        """Each rank's share of the vocabulary gives its share of the hidden states' gradient, hence the sum in the backward."""
        if self.config.sequence_parallel:
            hidden_T1H = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.pg_collection.tp)
            return hidden_T1H[:, 0].index_select(0, loss_positions_N)
        hidden_NH = hidden[:, 0].index_select(0, loss_positions_N)
        return tensor_parallel.copy_to_tensor_model_parallel_region(hidden_NH, group=self.pg_collection.tp)


def _has_transformer_engine(topology: Topology) -> bool:
    from megatron.core.models.gpt import gpt_layer_specs

    return gpt_layer_specs.HAVE_TE and topology.device.type == "cuda"


def _block_spec(config: TransformerConfig, part: int | None) -> TransformerBlockSubmodules:
    """The layers of a chunk: Transformer Engine's where they run, else Megatron's local ones with our norm and attention."""
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
        layer = get_gpt_layer_with_transformer_engine_spec(config.num_moe_experts, qk_layernorm=config.qk_layernorm)
    else:
        norm = RMSNorm
        layer = get_gpt_layer_local_spec(config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = norm
        if config.num_moe_experts:  # names in checkpoints as with Transformer Engine, which has nothing to fuse this norm into
            del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    layers: list[ModuleSpec] = [layer] * get_num_layers_to_build(config, part)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _finalize(chunks: Chunks, num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """``finalize_model_grads`` without its division by the number of tokens."""
    finalize_model_grads(chunks, None, **kwargs)


def transformer_config(
    shape: ModelShape,
    topology: Topology,
    dtype: torch.dtype,
    sequence_parallel: bool,
    recompute: Recompute,
    variable_lengths: bool,
) -> TransformerConfig:
    """Megatron's settings for this rank; arguments and errors are those of :func:`build_model`."""
    _check_layout(shape, topology, sequence_parallel)
    with_engine, on_cuda = _has_transformer_engine(topology), topology.device.type == "cuda"
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
        # Otherwise, of two stages, activations and gradients change places between the same two ranks in one batch of messages,
        # which are told apart by their order alone (pipeline_parallel/p2p_communication.py:26).
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        context_parallel_size=topology.context_size,
        expert_model_parallel_size=topology.expert_size,
        sequence_parallel=sequence_parallel and topology.tensor_size > 1,
        variable_seq_lengths=variable_lengths,
        # Megatron refuses variable lengths under the default dispatcher even in a model without experts
        # (transformer/transformer_config.py:1828); without them a pipeline over gloo delivers wrong shapes in silence.
        moe_token_dispatcher_type="alltoall",
        **_experts(shape.experts),
        use_cpu_initialization=not on_cuda,
        # All weights are loaded; but `perform_initialization=False` would leave `tensor_model_parallel` unset on them.
        init_method=torch.nn.init.zeros_,
        output_layer_init_method=torch.nn.init.zeros_,
        transformer_impl="transformer_engine" if with_engine else "local",
        apply_rope_fusion=with_engine,
        # Weight gradients straight into main_grad by apex's kernel. Transformer Engine has its own, but Megatron asks for
        # apex's wherever there is an LM head (tensor_parallel/layers.py:924).
        gradient_accumulation_fusion=on_cuda and find_spec("fused_weight_gradient_mlp_cuda") is not None,
        bias_activation_fusion=on_cuda,
        bias_dropout_fusion=False,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        recompute_modules=["mlp" if shape.experts is None else "moe"],
        calculate_per_token_loss=True,
        finalize_model_grads_func=_finalize,
    )


def _experts(experts: Experts | None) -> dict[str, Any]:
    """Megatron's settings for a mixture of experts: softmax router in float32, no dropped token, no auxiliary loss."""
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.num_experts,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.experts_per_token,
        # softmax over the chosen logits is softmax over all of them, chosen and scaled to sum to 1
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
        raise UserError(
            "parallel.sequence_parallel", False, "experts under tensor parallelism are trained only with it", "set it to true"
        )
    num_parts = topology.pipeline_size * topology.virtual_pipeline
    if shape.num_layers % num_parts:
        interleaved = topology.virtual_pipeline > 1
        raise UserError(
            "parallel.pipeline × parallel.virtual_pipeline" if interleaved else "parallel.pipeline",
            num_parts,
            f"does not divide the model's {shape.num_layers} layers",
            "choose a divisor",
        )


def padded_vocab(shape: ModelShape, topology: Topology) -> int:
    """Rows of embedding and LM head over all tensor ranks: ``shape.vocab_size`` rounded up, 128 rows a rank on CUDA."""
    multiple = 1 if topology.device.type == "cpu" else VOCABULARY_MULTIPLE
    return shape.padded_vocab(multiple * topology.tensor_size)


def build_model(
    shape: ModelShape,
    topology: Topology,
    *,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = True,
    recompute: Recompute = "none",
    variable_lengths: bool = True,
) -> Chunks:
    """This rank's part of the model, with zeros for weights until they are loaded: ``topology.virtual_pipeline`` chunks.

    Args:
        dtype: of weights and activations. Gradients are summed in float32.
        sequence_parallel: shard activations outside attention and MLP between tensor ranks; no effect at tensor size 1.
        recompute: what the backward computes again instead of keeping it: ``selective`` the MLPs, ``full`` whole layers.
        variable_lengths: pipeline stages tell each other the length of every pack. Without it all packs have one length.

    Raises:
        UserError: naming ``parallel.tensor`` or ``parallel.pipeline`` when the model cannot be cut that way.
    """
    config = transformer_config(shape, topology, dtype, sequence_parallel, recompute, variable_lengths)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=topology.device.type == "cuda",
    )
    chunks = [
        DistributedDataParallel(
            config=config, ddp_config=ddp_config, module=model.to(topology.device), disable_bucketing=part > 0
        )
        for part, model in enumerate(build_parts(shape, topology, config))
    ]
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return chunks


def build_parts(shape: ModelShape, topology: Topology, config: TransformerConfig) -> Iterator[PolicyModel]:
    """The chunks of :func:`build_model` before they get gradient buffers."""
    first, last = topology.is_first_stage, topology.is_last_stage
    for part in range(topology.virtual_pipeline):
        number = part if topology.virtual_pipeline > 1 else None
        yield PolicyModel(
            shape,
            config=config,
            transformer_layer_spec=_block_spec(config, number),
            vocab_size=padded_vocab(shape, topology),
            max_sequence_length=shape.max_positions,
            pre_process=first and part == 0,
            post_process=last and part == topology.virtual_pipeline - 1,
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="rope" if config.transformer_impl == "transformer_engine" else "none",
            rotary_base=shape.rope_theta,
            vp_stage=number,
        )


def policy_model(chunk: torch.nn.Module) -> PolicyModel:
    """The model inside DDP."""
    model = getattr(chunk, "module", chunk)
    assert isinstance(model, PolicyModel)
    return model


def lm_head_weight(chunk: torch.nn.Module) -> Tensor:
    """The LM head's rows of this tensor rank, ``[padded vocabulary / tensor size, H]``. Only where the model ends.

    Tied: the embedding itself, or on the last of several stages its second copy, which training keeps equal.
    """
    model = policy_model(chunk)
    assert model.post_process, "only the model's last chunk has an LM head"
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def run_schedule(
    chunks: Chunks, forward_step: ForwardStep, micro_batches: Sequence[Any], *, num_tokens: int = 1, forward_only: bool
) -> list[Any]:
    """Megatron's pipeline schedule over ``micro_batches``; see the example at the top of this file.

    Args:
        forward_step: takes an iterator over micro-batches, of which it draws one, and a chunk.
        num_tokens: of every pack, over all its context ranks; read only where lengths do not vary.

    Returns:
        The third item of every loss function, in the order of the micro-batches; nothing where the model does not end.
    """
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=num_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def zero_gradients(chunks: Sequence[DistributedDataParallel]) -> None:
    """Forget all gradients. Call it before every update."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
