"""Causal attention over packed sequences in plain torch, called by Megatron-Core as its ``core_attention``.

A pack is one row of T tokens that holds n sequences one after the other; a token sees its own sequence up to itself.

**Context parallelism.** Each of c ranks holds two chunks of every sequence, chunk r and chunk 2c − 1 − r of 2c equal ones, so
that all do the same work (Transformer Engine's order, :mod:`nft_megatron.batching.context`). Keys and values are gathered over
the ranks, which is cheap under grouped-query attention; queries stay where they are. A *piece* is a run of queries with the
keys they see: the last of its queries sees all of its keys. Without context parallelism a sequence is one piece with as many
queries as keys; with it a rank has two pieces of every sequence, each with the keys from the sequence's start to the chunk's
end. In the backward pass every rank has gradients for keys of all ranks: they are summed in float32 and each gets its own.

On the CPU pieces of nearly equal length are stacked into a batch (``_Bucket``) and go through torch's own attention: a padded
row costs its square, so buckets whose longest sequence is at most ``_MAX_STRETCH`` times the shortest do two thirds of the work
of one padded batch. Padding stands at the end of a row, so the causal mask alone keeps it out of every real token's sight. On
CUDA torch's variable-length kernel reads the pieces as they are.

What depends on the lengths and not on the layer (indices, cosines, sines) is computed once a micro-batch and carried by
:class:`PackedSequences`. Rotary positions are applied here rather than by Megatron, which splits the pack by sequence and takes
cosines anew for the query and the key of every layer.

Shapes: T tokens of the pack on this rank, K keys of all its pieces, R rows of all buckets, n pieces of a bucket, L the longest,
A query heads and G key-value heads of this tensor rank, D head dimension.
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
class _Bucket:
    """``num_pieces`` × ``num_queries`` consecutive rows of the padded queries and × ``num_keys`` of the padded keys."""

    num_pieces: int
    num_queries: int
    num_keys: int


@dataclass(frozen=True)
class _Rows:
    """The padded layout of queries or keys: for every row the token it shows, and for every token its row."""

    tokens_R: Tensor
    rows_T: Tensor


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's ``PackedSeqParams`` and what our attention needs besides. Made by :func:`pack_sequences`.

    key_index_K: where the keys of all pieces stand in the gathered keys of all context ranks; None without context parallelism.
    """

    key_index_K: Tensor | None = None
    query_rows: _Rows | None = None
    key_rows: _Rows | None = None
    buckets: tuple[_Bucket, ...] = ()
    piece_starts_q: Tensor | None = None
    piece_starts_k: Tensor | None = None
    longest_piece: tuple[int, int] = (0, 0)
    cos_T1D: Tensor | None = None
    sin_T1D: Tensor | None = None


def pack_sequences(
    lengths: Sequence[int], device: torch.device, context_rank: int = 0, context_size: int = 1
) -> PackedSequences:
    """Describe a pack of sequences of these lengths, in this order, as one context-parallel rank sees it.

    The lengths are those of the whole pack, and multiples of 2 · ``context_size`` where that is more than 1.

    >>> packed = pack_sequences([3, 2, 3], torch.device("cpu"))
    >>> packed.cu_seqlens_q.tolist(), packed.max_seqlen_q
    ([0, 3, 5, 8], 3)
    >>> packed.query_rows.tokens_R.tolist(), packed.query_rows.rows_T.tolist()
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
    pieces = [(length, length) for length in lengths]
    if context_size > 1:
        chunks = [length // (2 * context_size) for length in lengths]
        places = (context_rank, 2 * context_size - 1 - context_rank)
        pieces = [(chunk, (place + 1) * chunk) for chunk in chunks for place in places]
        in_turn = torch.cat([zigzag_index(cu_seqlens.cpu(), rank, context_size) for rank in range(context_size)])
        gathered_T = torch.empty_like(in_turn)
        gathered_T[in_turn] = torch.arange(len(in_turn))
        firsts = [start for start in starts[:-1] for _ in places]
        keys = [gathered_T[first : first + num_keys] for first, (_, num_keys) in zip(firsts, pieces, strict=True)]
        packed.key_index_K = torch.cat(keys).to(device)
    if device.type == "cpu":
        packed.buckets, packed.query_rows, packed.key_rows = _bucket(pieces)
    else:
        for name, sizes in (("piece_starts_q", [q for q, _ in pieces]), ("piece_starts_k", [k for _, k in pieces])):
            setattr(packed, name, torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=device))
        packed.longest_piece = (max(q for q, _ in pieces), max(k for _, k in pieces))
    return packed


def _bucket(pieces: Sequence[tuple[int, int]]) -> tuple[tuple[_Bucket, ...], _Rows, _Rows]:
    """Buckets of pieces (queries, keys), and the rows of queries and of keys.

    Pieces of as many queries as keys may be padded to the longest of their bucket; others meet only their like, as padding at
    the end would shift which keys a query sees.
    """
    members: list[list[int]] = []
    for piece in sorted(range(len(pieces)), key=lambda piece: (pieces[piece][1], pieces[piece][0]), reverse=True):
        queries, keys = pieces[piece]
        first = pieces[members[-1][0]] if members else (0, 0)
        fits = pieces[piece] == first or (queries == keys and first[0] == first[1] <= keys * _MAX_STRETCH)
        if members and fits:
            members[-1].append(piece)
        else:
            members.append([piece])
    buckets = tuple(_Bucket(len(bucket), *pieces[bucket[0]]) for bucket in members)
    rows = [_rows([piece[side] for piece in pieces], members) for side in (0, 1)]
    return buckets, rows[0], rows[1]


def _rows(lengths: Sequence[int], members: Sequence[Sequence[int]]) -> _Rows:
    """Lay out runs of tokens of these lengths bucket by bucket; a padding row shows its run's last token."""
    starts = [0, *itertools.accumulate(lengths)]
    tokens, offset = [], 0
    rows_T = torch.empty(starts[-1], dtype=torch.long)
    for bucket in members:
        longest = lengths[bucket[0]]
        position_L = torch.arange(longest)
        for member in bucket:
            start, own = starts[member], lengths[member]
            tokens.append(start + position_L.clamp(max=own - 1))
            rows_T[start : start + own] = offset + position_L[:own]
            offset += longest
    return _Rows(torch.cat(tokens), rows_T)


class _ContextKeys(torch.autograd.Function):
    """Keys (or values) of this rank's tokens → the keys of its pieces, gathered over the context ranks."""

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
    """Σ over ranks of ``everywhere``, of which each rank gets its own consecutive part."""
    own = everywhere.new_empty(len(everywhere) // group.size(), *everywhere.shape[1:])
    dist.reduce_scatter_tensor(own, everywhere, group=group)
    return own


class _ToRows(torch.autograd.Function):
    """Tokens → padded rows. No gradient reaches a padding row, so the backward is the plain inverse and sums nothing."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, tokens_R: Tensor, rows_T: Tensor) -> Tensor:
        ctx.save_for_backward(rows_T)
        return x_T.index_select(0, tokens_R)

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (rows_T,) = ctx.saved_tensors
        return grad_R.index_select(0, rows_T), None, None


class _FromRows(torch.autograd.Function):
    """Padded rows → tokens. Padding rows get a zero gradient."""

    @staticmethod
    def forward(ctx: Any, x_R: Tensor, rows_T: Tensor) -> Tensor:
        ctx.save_for_backward(rows_T)
        ctx.shape = x_R.shape
        return x_R.index_select(0, rows_T)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (rows_T,) = ctx.saved_tensors
        return grad_T.new_zeros(ctx.shape).index_copy_(0, rows_T, grad_T), None


def rotary_cos_sin(position_ids_T: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines ``[T, 1, D]`` of the rotary angles position · frequency, taken in float32.

    ``frequencies`` ``[D/2]`` are those of :func:`nft_megatron.weights.rotary.inverse_frequencies`. Both halves of D have the
    same angles; the sines of the first half are negated, as :func:`_rotate` wants them.
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

        ``attention_mask`` and Megatron's mask type are not read: the pack says it all.
        """
        packed = packed_seq_params
        query_TAD = _Rotary.apply(query_TAD, packed.cos_T1D, packed.sin_T1D)
        key_KGD, value_KGD = _Rotary.apply(key_TGD, packed.cos_T1D, packed.sin_T1D), value_TGD
        if packed.key_index_K is not None:
            both = torch.cat((key_KGD, value_KGD), dim=-1)  # one collective for the two
            key_KGD, value_KGD = _ContextKeys.apply(both, packed.key_index_K, self.context_group).chunk(2, dim=-1)
        attend = self._attend_in_rows if packed.buckets else self._attend_in_pack
        return attend(query_TAD, key_KGD, value_KGD, packed).flatten(1).unsqueeze(1)

    def _attend_in_rows(self, query_TAD: Tensor, key_KGD: Tensor, value_KGD: Tensor, packed: PackedSequences) -> Tensor:
        query_rows, key_rows = packed.query_rows, packed.key_rows
        assert query_rows is not None and key_rows is not None
        num_queries = [bucket.num_pieces * bucket.num_queries for bucket in packed.buckets]
        num_keys = [bucket.num_pieces * bucket.num_keys for bucket in packed.buckets]
        parts = zip(
            packed.buckets,
            _ToRows.apply(query_TAD, query_rows.tokens_R, query_rows.rows_T).split(num_queries),
            _ToRows.apply(key_KGD, key_rows.tokens_R, key_rows.rows_T).split(num_keys),
            _ToRows.apply(value_KGD, key_rows.tokens_R, key_rows.rows_T).split(num_keys),
            strict=True,
        )
        outputs = []
        for bucket, *qkv in parts:
            query, key, value = (x.unflatten(0, (bucket.num_pieces, -1)).transpose(1, 2) for x in qkv)
            is_square = bucket.num_queries == bucket.num_keys
            output_nALD = functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=None if is_square else _sight(bucket),
                is_causal=is_square,
                scale=self.softmax_scale,
                enable_gqa=True,
            )
            outputs.append(output_nALD.transpose(1, 2).flatten(0, 1))
        return _FromRows.apply(torch.cat(outputs), query_rows.rows_T)

    def _attend_in_pack(self, query_TAD: Tensor, key_KGD: Tensor, value_KGD: Tensor, packed: PackedSequences) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # absent from torch before 2.10

        assert packed.piece_starts_q is not None
        output_TAD = varlen_attn(
            query_TAD,
            key_KGD,
            value_KGD,
            packed.piece_starts_q,
            packed.piece_starts_k,
            *packed.longest_piece,
            scale=self.softmax_scale,
            window_size=(-1, 0),  # causal, counted from the last query and the last key
            enable_gqa=True,
        )
        assert isinstance(output_TAD, Tensor)  # a tuple only when asked for the log-sum-exp
        return output_TAD


def _sight(bucket: _Bucket) -> Tensor:
    """Which of its keys each query of a piece sees: the last sees all, each one before it one less."""
    whole = torch.ones(bucket.num_queries, bucket.num_keys, dtype=torch.bool)
    return whole.tril(bucket.num_keys - bucket.num_queries)
