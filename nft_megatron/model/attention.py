"""Causal attention over packed sequences in plain torch, called by Megatron-Core as its ``core_attention``.

A pack is one row of T tokens that holds n sequences end to end; a token sees its own sequence up to itself.

**Context parallelism.** Each of c ranks holds two chunks of every sequence, chunk r and chunk 2c − 1 − r of 2c equal ones, so
that all do the same work (Transformer Engine's order, :mod:`nft_megatron.batching.context`). Keys and values are gathered over
the ranks, which is cheap under grouped-query attention; queries stay where they are. In the backward pass every rank has
gradients for keys of all ranks: they are summed in float32 and each rank gets its own.

Three kinds (:func:`.attention_kind`). ``padded``: chunks of nearly equal length are stacked into a batch (``ChunkBatch``) and
go through torch's scaled-dot-product attention. A padded range costs its square, so batches whose longest chunk is at most
``_MAX_STRETCH`` times the shortest do two thirds of the work of one padded batch. Padding is at the end of a range, so the
causal mask alone hides it from every real token. ``varlen``: torch's variable-length kernel, which exists on CUDA for 16-bit
dtypes, reads the chunks as they are. ``engine``: Transformer Engine does it all, and needs the bounds of the sequences only.

What depends on the lengths and not on the layer (indices, cosines, sines) is computed once per micro-batch and carried by
:class:`.PackedSequences`. Rotary positions are applied here rather than by Megatron, which splits the pack by sequence and
recomputes cosines for the query and the key of every layer.

Shapes: T tokens of the pack on this rank, K keys of all its chunks, R tokens of all padded ranges, n chunks of a batch, L the
longest of them, A query heads and G key-value heads of this tensor rank, D head dimension.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from nft_megatron.model.packed_sequences import ChunkBatch, PackedSequences


class _ContextKeys(torch.autograd.Function):
    """Keys (or values) of this rank's tokens → the keys of its chunks, gathered over the context ranks."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, key_index_K: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(key_index_K)
        ctx.group, ctx.shape = group, x_T.shape
        everywhere = x_T.new_empty(group.size() * len(x_T), *x_T.shape[1:])
        dist.all_gather_into_tensor(everywhere, x_T.contiguous(), group=group)
        return everywhere.index_select(0, key_index_K)

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (key_index_K,) = ctx.saved_tensors
        num_local, *rest = ctx.shape
        everywhere = torch.zeros(ctx.group.size() * num_local, *rest, dtype=torch.float32, device=grad_K.device)
        everywhere.index_add_(0, key_index_K, grad_K.float())
        return _sum_own(everywhere, ctx.group).to(grad_K.dtype), None, None


def _sum_own(everywhere: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of ``everywhere`` over ranks; each rank gets its own consecutive part."""
    own = everywhere.new_empty(len(everywhere) // group.size(), *everywhere.shape[1:])
    dist.reduce_scatter_tensor(own, everywhere, group=group)
    return own


class _Pad(torch.autograd.Function):
    """Tokens → padded ranges. No gradient reaches padding, so the backward is the plain inverse without a sum."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, tokens_R: Tensor, positions_T: Tensor) -> Tensor:
        ctx.save_for_backward(positions_T)
        return x_T.index_select(0, tokens_R)

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (positions_T,) = ctx.saved_tensors
        return grad_R.index_select(0, positions_T), None, None


class _Unpad(torch.autograd.Function):
    """Padded ranges → tokens. Padding gets a zero gradient."""

    @staticmethod
    def forward(ctx: Any, x_R: Tensor, positions_T: Tensor) -> Tensor:
        ctx.save_for_backward(positions_T)
        ctx.shape = x_R.shape
        return x_R.index_select(0, positions_T)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (positions_T,) = ctx.saved_tensors
        return grad_T.new_zeros(ctx.shape).index_copy_(0, positions_T, grad_T), None


def rotary_cos_sin(position_ids_T: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines ``[T, 1, D]`` of the rotary angles position · frequency, taken in float32.

    ``frequencies`` ``[D/2]`` are those of :func:`nft_megatron.weights.rotary.inverse_frequencies`. Both halves of D have the
    same angles; the sines of the first half are negated, as :func:`_rotate` expects.
    """
    angle_T1D = (position_ids_T.float()[:, None] * frequencies)[:, None]
    cos_T1D, sin_T1D = angle_T1D.cos().to(dtype), angle_T1D.sin().to(dtype)
    return torch.cat((cos_T1D, cos_T1D), dim=-1), torch.cat((-sin_T1D, sin_T1D), dim=-1)


def _rotate(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2), the halves-apart convention of GPT-NeoX that Qwen and Llama use."""
    first, second = x_THD.chunk(2, dim=-1)
    return torch.addcmul(x_THD * cos_T1D, torch.cat((second, first), dim=-1), sin_T1D)


class _Rotary(torch.autograd.Function):
    """:func:`_rotate`; its transpose, and so its backward, is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1D, sin_T1D)
        return _rotate(x_THD, cos_T1D, sin_T1D)

    @staticmethod
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos_T1D, sin_T1D = ctx.saved_tensors
        return _rotate(grad_THD, cos_T1D, -sin_T1D), None, None


class PackedAttention(torch.nn.Module):
    """Megatron's ``core_attention`` for packed sequences without Transformer Engine; grouped-query, causal, no dropout."""

    def __init__(self, config: Any, pg_collection: Any, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale or config.kv_channels**-0.5
        self.context_group: dist.ProcessGroup = pg_collection.cp

    def forward(
        self,
        query_TAD: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSequences,
        **_: Any,
    ) -> Tensor:
        """Attend within each sequence of the pack; returns ``[T, 1, A·D]``.

        ``attention_mask`` and Megatron's mask type are ignored: the pack determines everything.
        """
        packed = packed_seq_params
        query_TAD = _Rotary.apply(query_TAD, packed.cos_T1D, packed.sin_T1D)
        key_KGD, value_KGD = _Rotary.apply(key_TGD, packed.cos_T1D, packed.sin_T1D), value_TGD
        if packed.key_index_K is not None:
            both = torch.cat((key_KGD, value_KGD), dim=-1)  # one collective for both
            key_KGD, value_KGD = _ContextKeys.apply(both, packed.key_index_K, self.context_group).chunk(2, dim=-1)
        attend = self._attend_in_batches if packed.batches else self._attend_in_pack
        return attend(query_TAD, key_KGD, value_KGD, packed).flatten(1).unsqueeze(1)

    def _attend_in_batches(self, query_TAD: Tensor, key_KGD: Tensor, value_KGD: Tensor, packed: PackedSequences) -> Tensor:
        query_ranges, key_ranges = packed.query_ranges, packed.key_ranges
        assert query_ranges is not None and key_ranges is not None
        num_queries = [batch.num_chunks * batch.num_queries for batch in packed.batches]
        num_keys = [batch.num_chunks * batch.num_keys for batch in packed.batches]
        parts = zip(
            packed.batches,
            _Pad.apply(query_TAD, query_ranges.tokens_R, query_ranges.positions_T).split(num_queries),
            _Pad.apply(key_KGD, key_ranges.tokens_R, key_ranges.positions_T).split(num_keys),
            _Pad.apply(value_KGD, key_ranges.tokens_R, key_ranges.positions_T).split(num_keys),
            strict=True,
        )
        outputs = []
        for batch, *qkv in parts:
            query, key, value = (x.unflatten(0, (batch.num_chunks, -1)).transpose(1, 2) for x in qkv)
            is_square = batch.num_queries == batch.num_keys
            output_nALD = functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=None if is_square else _visible_keys(batch, query.device),
                is_causal=is_square,
                scale=self.softmax_scale,
                enable_gqa=True,
            )
            outputs.append(output_nALD.transpose(1, 2).flatten(0, 1))
        return _Unpad.apply(torch.cat(outputs), query_ranges.positions_T)

    def _attend_in_pack(self, query_TAD: Tensor, key_KGD: Tensor, value_KGD: Tensor, packed: PackedSequences) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        assert packed.chunk_starts_q is not None
        output_TAD = varlen_attn(
            query_TAD,
            key_KGD,
            value_KGD,
            packed.chunk_starts_q,
            packed.chunk_starts_k,
            *packed.longest_chunk,
            scale=self.softmax_scale,
            window_size=(-1, 0),  # causal, counted from the last query and the last key
            **_grouped_heads(),
        )
        assert isinstance(output_TAD, Tensor)  # a tuple only if the log-sum-exp is requested
        return output_TAD


@cache
def _grouped_heads() -> dict[str, Any]:
    """What tells the variable-length kernel that keys have fewer heads. torch 2.11 has no such argument and does not ask."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def _visible_keys(batch: ChunkBatch, device: torch.device) -> Tensor:
    """Mask ``[queries, keys]``, True where a query sees a key: the last query sees all, each earlier one one fewer."""
    whole = torch.ones(batch.num_queries, batch.num_keys, dtype=torch.bool, device=device)
    return whole.tril(batch.num_keys - batch.num_queries)
