"""Causal attention over packed sequences in plain torch, called by Megatron-Core as its ``core_attention``.

A pack is one row of T tokens that holds n sequences end to end; a token sees its own sequence up to itself.

**Context parallelism.** Each of c ranks holds two chunks of every sequence, chunk r and chunk 2c − 1 − r of 2c equal ones, so
that all do the same work (Transformer Engine's order, :mod:`nft_megatron.batching.context`). Keys and values are gathered over
the ranks, which is cheap under grouped-query attention; queries stay where they are. A *chunk* is a range of queries together
with their visible keys: the last of its queries sees all of its keys. Without context parallelism a sequence is one chunk with
as many queries as keys; with it a rank has two chunks of every sequence, each with the keys from the sequence's start to the
chunk's end. In the backward pass every rank has gradients for keys of all ranks: they are summed in float32 and each rank gets
its own.

On the CPU, chunks of nearly equal length are stacked into a batch (``_ChunkBatch``) and go through torch's own attention: a
padded range costs its square, so batches whose longest chunk is at most ``_MAX_STRETCH`` times the shortest do two thirds of
the work of one padded batch. Padding is at the end of a range, so the causal mask alone hides it from every real token. On
CUDA, torch's variable-length kernel reads the chunks as they are.

What depends on the lengths and not on the layer (indices, cosines, sines) is computed once per micro-batch and carried by
:class:`PackedSequences`. Rotary positions are applied here rather than by Megatron, which splits the pack by sequence and
recomputes cosines for the query and the key of every layer.

Shapes: T tokens of the pack on this rank, K keys of all its chunks, R tokens of all padded ranges, n chunks of a batch, L the
longest of them, A query heads and G key-value heads of this tensor rank, D head dimension.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn import functional

from nft_megatron.batching.context import zigzag_index

_MAX_STRETCH = 1.125


@dataclass(frozen=True)
class _ChunkBatch:
    """``num_chunks`` consecutive ranges of ``num_queries`` padded queries, and as many of ``num_keys`` padded keys."""

    num_chunks: int
    num_queries: int
    num_keys: int


@dataclass(frozen=True)
class _PaddedRanges:
    """All query or key ranges, padded: the token at every padded position, and the padded position of every token."""

    tokens_R: Tensor
    positions_T: Tensor


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's ``PackedSeqParams`` and what else our attention needs. Made by :func:`pack_sequences`.

    key_index_K: indices of all chunks' keys in the gathered keys of all context ranks; None without context parallelism.
    """

    key_index_K: Tensor | None = None
    query_ranges: _PaddedRanges | None = None
    key_ranges: _PaddedRanges | None = None
    batches: tuple[_ChunkBatch, ...] = ()
    chunk_starts_q: Tensor | None = None
    chunk_starts_k: Tensor | None = None
    longest_chunk: tuple[int, int] = (0, 0)
    cos_T1D: Tensor | None = None
    sin_T1D: Tensor | None = None


def pack_sequences(
    lengths: Sequence[int], device: torch.device, context_rank: int = 0, context_size: int = 1
) -> PackedSequences:
    """Describe a pack of sequences of these lengths, in this order, as one context-parallel rank sees it.

    The lengths are those of the whole pack; with ``context_size`` > 1, multiples of 2 · ``context_size``.

    >>> packed = pack_sequences([3, 2, 3], torch.device("cpu"))
    >>> packed.cu_seqlens_q.tolist(), packed.max_seqlen_q
    ([0, 3, 5, 8], 3)
    >>> packed.query_ranges.tokens_R.tolist(), packed.query_ranges.positions_T.tolist()
    ([0, 1, 2, 5, 6, 7, 3, 4], [0, 1, 2, 6, 7, 3, 4, 5])
    >>> second_rank = pack_sequences([8], torch.device("cpu"), context_rank=1, context_size=2)  # tokens 2 3 4 5 of 8
    >>> second_rank.key_index_K.tolist()  # 0 1 2 3 and 0 1 2 3 4 5, in 0 1 6 7 of the first rank and 2 3 4 5 of the second
    [0, 1, 4, 5, 0, 1, 4, 5, 6, 7]
    """
    starts = [0, *itertools.accumulate(lengths)]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
    packed = PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    chunks = [(length, length) for length in lengths]  # numbers of queries and of visible keys
    if context_size > 1:
        sizes = [length // (2 * context_size) for length in lengths]
        places = (context_rank, 2 * context_size - 1 - context_rank)
        chunks = [(size, (place + 1) * size) for size in sizes for place in places]
        in_turn = torch.cat([zigzag_index(cu_seqlens.cpu(), rank, context_size) for rank in range(context_size)])
        gathered_T = torch.empty_like(in_turn)
        gathered_T[in_turn] = torch.arange(len(in_turn))
        firsts = [start for start in starts[:-1] for _ in places]
        keys = [gathered_T[first : first + num_keys] for first, (_, num_keys) in zip(firsts, chunks, strict=True)]
        packed.key_index_K = torch.cat(keys).to(device)
    if device.type == "cpu":
        packed.batches, packed.query_ranges, packed.key_ranges = _batch_chunks(chunks)
    else:
        for name, counts in (("chunk_starts_q", [q for q, _ in chunks]), ("chunk_starts_k", [k for _, k in chunks])):
            setattr(packed, name, torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device))
        packed.longest_chunk = (max(q for q, _ in chunks), max(k for _, k in chunks))
    return packed


def _batch_chunks(chunks: Sequence[tuple[int, int]]) -> tuple[tuple[_ChunkBatch, ...], _PaddedRanges, _PaddedRanges]:
    """Batches of chunks (queries, keys), and the padded query ranges and key ranges.

    Chunks with as many queries as keys may be padded to the longest of their batch; others are only batched with equal ones,
    because padding at the end would shift which keys a query sees.
    """
    members: list[list[int]] = []
    for chunk in sorted(range(len(chunks)), key=lambda chunk: (chunks[chunk][1], chunks[chunk][0]), reverse=True):
        queries, keys = chunks[chunk]
        first = chunks[members[-1][0]] if members else (0, 0)
        fits = chunks[chunk] == first or (queries == keys and first[0] == first[1] <= keys * _MAX_STRETCH)
        if members and fits:
            members[-1].append(chunk)
        else:
            members.append([chunk])
    batches = tuple(_ChunkBatch(len(batch), *chunks[batch[0]]) for batch in members)
    ranges = [_pad_ranges([chunk[side] for chunk in chunks], members) for side in (0, 1)]
    return batches, ranges[0], ranges[1]


def _pad_ranges(lengths: Sequence[int], members: Sequence[Sequence[int]]) -> _PaddedRanges:
    """Lay out ranges of tokens of these lengths batch by batch; padding repeats its range's last token."""
    starts = [0, *itertools.accumulate(lengths)]
    tokens, offset = [], 0
    positions_T = torch.empty(starts[-1], dtype=torch.long)
    for batch in members:
        longest = lengths[batch[0]]
        position_L = torch.arange(longest)
        for member in batch:
            start, own = starts[member], lengths[member]
            tokens.append(start + position_L.clamp(max=own - 1))
            positions_T[start : start + own] = offset + position_L[:own]
            offset += longest
    return _PaddedRanges(torch.cat(tokens), positions_T)


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
                attn_mask=None if is_square else _visible_keys(batch),
                is_causal=is_square,
                scale=self.softmax_scale,
                enable_gqa=True,
            )
            outputs.append(output_nALD.transpose(1, 2).flatten(0, 1))
        return _Unpad.apply(torch.cat(outputs), query_ranges.positions_T)

    def _attend_in_pack(self, query_TAD: Tensor, key_KGD: Tensor, value_KGD: Tensor, packed: PackedSequences) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # absent from torch before 2.10

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
            enable_gqa=True,
        )
        assert isinstance(output_TAD, Tensor)  # a tuple only if the log-sum-exp is requested
        return output_TAD


def _visible_keys(batch: _ChunkBatch) -> Tensor:
    """Mask ``[queries, keys]``, True where a query sees a key: the last query sees all, each earlier one one fewer."""
    whole = torch.ones(batch.num_queries, batch.num_keys, dtype=torch.bool)
    return whole.tril(batch.num_keys - batch.num_queries)
