"""The decoder to train: Megatron-Core's ``GPTModel`` over packed sequences, up to its final norm.

Shapes: T tokens of the pack on this context rank (divisible by the tensor size under sequence parallelism), N of its positions
that carry a loss, H hidden.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from nft_megatron.model.attention import PackedAttention, rotary_cos_sin
from nft_megatron.model.packed_sequences import PackedSequences
from nft_megatron.model.weight_gathering import await_weight
from nft_megatron.weights import ModelShape
from nft_megatron.weights.rotary import inverse_frequencies

# transformer/moe/moe_utils.py:1192 tests whether this is None; without Transformer Engine nothing defines it.
vars(moe_utils).setdefault("te_general_gemm", None)


class RMSNorm(torch.nn.Module):
    """RMSNorm whose weight Megatron's gradient finalisation recognises under sequence parallelism.

    Megatron's own norm for the local spec refuses sequence parallelism (transformer/torch_norm.py:32).
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

    Logits are left to the caller (with :func:`lm_head_weight`), which computes them in chunks, never all at once.
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
        """Run one pipeline stage of one micro-batch.

        Every tensor rank and every stage of a data-parallel rank passes the same arguments; context ranks pass their own share.

        Returns:
            Where the model ends, ``[N, H]``, complete on every tensor rank; the backward sums the ranks' gradients. Elsewhere
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


def block_spec(config: TransformerConfig, part: int | None) -> TransformerBlockSubmodules:
    """The layers of a chunk: Transformer Engine's if available, else Megatron's local ones with our norm and attention."""
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
        if config.num_moe_experts:  # checkpoint names as with Transformer Engine, which cannot fuse this norm
            del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    layers: list[ModuleSpec] = [layer] * get_num_layers_to_build(config, part)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def policy_model(chunk: torch.nn.Module) -> PolicyModel:
    """The model inside DDP."""
    model = getattr(chunk, "module", chunk)
    assert isinstance(model, PolicyModel)
    return model


def lm_head_weight(chunk: torch.nn.Module) -> Tensor:
    """This tensor rank's rows of the LM head, ``[padded vocabulary / tensor size, H]``. Only where the model ends.

    If tied, the embedding itself, or on the last of several stages its second copy, which training keeps equal.
    """
    model = policy_model(chunk)
    assert model.post_process, "only the model's last chunk has an LM head"
    tied = model.share_embeddings_and_output_weights
    weight_VH = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    await_weight(chunk, weight_VH)
    return weight_VH
