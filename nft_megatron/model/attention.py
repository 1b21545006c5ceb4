"""Causal attention over packed sequences in plain torch, called by Megatron-Core as its ``core_attention``.

A pack is one row of T tokens that holds n sequences one after the other; a token sees its own sequence up to itself. On the CPU
sequences of nearly equal length are stacked into a batch (``_Bucket``) and go through torch's own attention: a padded row costs
its square, so buckets whose longest sequence is at most ``_MAX_STRETCH`` times the shortest do two thirds of the work of one
padded batch. Padding stands at the end of a row, so the causal mask alone keeps it out of every real token's sight. On CUDA
torch's variable-length kernel reads the pack as it is.

What depends on the lengths and not on the layer (indices, cosines, sines) is computed once a micro-batch and carried by
:class:`PackedSequences`. Rotary positions are applied here rather than by Megatron, which splits the pack by sequence and takes
cosines anew for the query and the key of every layer.

Shapes: T tokens of the pack, R rows of all buckets, n sequences of a bucket, L its longest, A query heads and G key-value heads
of this tensor rank, D head dimension.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn import functional

_MAX_STRETCH = 1.125


@dataclass(frozen=True)
class _Bucket:
    """``num_sequences`` × ``length`` consecutive rows of the padded layout."""

    num_sequences: int
    length: int


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's ``PackedSeqParams`` and what our attention needs besides. Made by :func:`pack_sequences`."""

    pack_to_rows_R: Tensor | None = None
    rows_to_pack_T: Tensor | None = None
    buckets: tuple[_Bucket, ...] = ()
    cos_T1D: Tensor | None = None
    sin_T1D: Tensor | None = None


def pack_sequences(lengths: Sequence[int], device: torch.device) -> PackedSequences:
    """Describe a pack of sequences of these lengths, in this order.

    >>> packed = pack_sequences([3, 2, 3], torch.device("cpu"))
    >>> packed.cu_seqlens_q.tolist(), packed.max_seqlen_q
    ([0, 3, 5, 8], 3)
    >>> packed.pack_to_rows_R.tolist(), packed.rows_to_pack_T.tolist()
    ([0, 1, 2, 5, 6, 7, 3, 4], [0, 1, 2, 6, 7, 3, 4, 5])
    """
    starts = [0, *itertools.accumulate(lengths)]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
    longest = max(lengths)
    packed = PackedSequences(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    if device.type == "cpu":
        packed.buckets, packed.pack_to_rows_R, packed.rows_to_pack_T = _bucket_rows(lengths, starts)
    return packed


def _bucket_rows(lengths: Sequence[int], starts: Sequence[int]) -> tuple[tuple[_Bucket, ...], Tensor, Tensor]:
    """The buckets, and for every row the token it shows (its sequence's last one for padding), and for every token its row."""
    members: list[list[int]] = []
    for sequence in sorted(range(len(lengths)), key=lambda sequence: -lengths[sequence]):
        if members and lengths[sequence] * _MAX_STRETCH >= lengths[members[-1][0]]:
            members[-1].append(sequence)
        else:
            members.append([sequence])
    pack_to_rows, offset = [], 0
    rows_to_pack_T = torch.empty(starts[-1], dtype=torch.long)
    for bucket in members:
        length = lengths[bucket[0]]
        position_L = torch.arange(length)
        for sequence in bucket:
            start, own = starts[sequence], lengths[sequence]
            pack_to_rows.append(start + position_L.clamp(max=own - 1))
            rows_to_pack_T[start : start + own] = offset + position_L[:own]
            offset += length
    buckets = tuple(_Bucket(len(bucket), lengths[bucket[0]]) for bucket in members)
    return buckets, torch.cat(pack_to_rows), rows_to_pack_T


class _ToRows(torch.autograd.Function):
    """Pack → padded rows. No gradient reaches a padding row, so the backward is the plain inverse and sums nothing."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, pack_to_rows_R: Tensor, rows_to_pack_T: Tensor) -> Tensor:
        ctx.save_for_backward(rows_to_pack_T)
        return x_T.index_select(0, pack_to_rows_R)

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (rows_to_pack_T,) = ctx.saved_tensors
        return grad_R.index_select(0, rows_to_pack_T), None, None


class _FromRows(torch.autograd.Function):
    """Padded rows → pack. Padding rows get a zero gradient."""

    @staticmethod
    def forward(ctx: Any, x_R: Tensor, rows_to_pack_T: Tensor) -> Tensor:
        ctx.save_for_backward(rows_to_pack_T)
        ctx.shape = x_R.shape
        return x_R.index_select(0, rows_to_pack_T)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (rows_to_pack_T,) = ctx.saved_tensors
        return grad_T.new_zeros(ctx.shape).index_copy_(0, rows_to_pack_T, grad_T), None


def rotary_cos_sin(position_ids_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines ``[T, 1, D]`` of the rotary angles ``position / theta^(2i/D)``, taken in float32.

    Both halves of D have the same angles; the sines of the first half are negated, as :func:`_rotate` wants them.
    """
    exponent_D = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids_T.device) / head_dim
    angle_T1D = (position_ids_T.float()[:, None] / theta**exponent_D)[:, None]
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

    def __init__(self, config: Any, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        assert config.context_parallel_size == 1, "context parallel attention is not built yet"
        self.softmax_scale = softmax_scale or config.kv_channels**-0.5

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

        ``attention_mask`` and Megatron's mask type are not read: the pack says it all.
        """
        packed = packed_seq_params
        query_TAD = _Rotary.apply(query_TAD, packed.cos_T1D, packed.sin_T1D)
        key_TGD = _Rotary.apply(key_TGD, packed.cos_T1D, packed.sin_T1D)
        attend = self._attend_in_rows if packed.buckets else self._attend_in_pack
        return attend(query_TAD, key_TGD, value_TGD, packed).flatten(1).unsqueeze(1)

    def _attend_in_rows(self, query_TAD: Tensor, key_TGD: Tensor, value_TGD: Tensor, packed: PackedSequences) -> Tensor:
        rows = [_ToRows.apply(x, packed.pack_to_rows_R, packed.rows_to_pack_T) for x in (query_TAD, key_TGD, value_TGD)]
        sizes = [bucket.num_sequences * bucket.length for bucket in packed.buckets]
        outputs = []
        for bucket, *qkv in zip(packed.buckets, *(x.split(sizes) for x in rows), strict=True):
            query, key, value = (x.unflatten(0, (bucket.num_sequences, bucket.length)).transpose(1, 2) for x in qkv)
            output_nALD = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
            )
            outputs.append(output_nALD.transpose(1, 2).flatten(0, 1))
        return _FromRows.apply(torch.cat(outputs), packed.rows_to_pack_T)

    def _attend_in_pack(self, query_TAD: Tensor, key_TGD: Tensor, value_TGD: Tensor, packed: PackedSequences) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # absent from torch before 2.10

        output_TAD = varlen_attn(
            query_TAD,
            key_TGD,
            value_TGD,
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            scale=self.softmax_scale,
            window_size=(-1, 0),
            enable_gqa=True,
        )
        assert isinstance(output_TAD, Tensor)  # a tuple only when asked for the log-sum-exp
        return output_TAD
