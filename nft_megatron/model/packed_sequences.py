"""The description of a pack of sequences that Megatron-Core hands to every layer: what depends on lengths and not on the layer.

Computed once per micro-batch. A *chunk* is a range of queries together with their visible keys: the last of its queries sees
all of its keys. Without context parallelism a sequence is one chunk with as many queries as keys; with it a rank has two chunks
of every sequence, each with the keys from the sequence's start to the chunk's end. Shapes as in :mod:`.attention`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nft_megatron.batching.context import zigzag_index
from nft_megatron.batching.device import to_device

Attention = Literal["padded", "varlen", "engine"]

_MAX_STRETCH = 1.125


@dataclass(frozen=True)
class ChunkBatch:
    """``num_chunks`` consecutive ranges of ``num_queries`` padded queries, and as many of ``num_keys`` padded keys."""

    num_chunks: int
    num_queries: int
    num_keys: int


@dataclass(frozen=True)
class PaddedRanges:
    """All query or key ranges, padded: the token at every padded position, and the padded position of every token."""

    tokens_R: Tensor
    positions_T: Tensor


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's ``PackedSeqParams`` and what else our attention needs. Made by :func:`pack_sequences`.

    key_index_K: indices of all chunks' keys in the gathered keys of all context ranks; None without context parallelism.
    Of the others, ``padded`` attention has the ranges and batches, ``varlen`` the starts and the longest chunk.
    """

    key_index_K: Tensor | None = None
    query_ranges: PaddedRanges | None = None
    key_ranges: PaddedRanges | None = None
    batches: tuple[ChunkBatch, ...] = ()
    chunk_starts_q: Tensor | None = None
    chunk_starts_k: Tensor | None = None
    longest_chunk: tuple[int, int] = (0, 0)
    cos_T1D: Tensor | None = None
    sin_T1D: Tensor | None = None


def attention_kind(transformer_impl: str, dtype: torch.dtype, device: torch.device) -> Attention:
    """How a model with Megatron's layer spec of this name computes attention.

    >>> [attention_kind("local", dtype, torch.device("cuda")) for dtype in (torch.bfloat16, torch.float32)]
    ['varlen', 'padded']
    """
    if transformer_impl == "transformer_engine":
        return "engine"
    return "varlen" if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) else "padded"


def pack_sequences(
    lengths: Sequence[int],
    device: torch.device,
    context_rank: int = 0,
    context_size: int = 1,
    attention: Attention = "padded",
) -> PackedSequences:
    """Describe a pack of sequences of these lengths, in this order, as one context-parallel rank sees it.

    The lengths are those of the whole pack; with ``context_size`` > 1, multiples of 2 · ``context_size``. All is computed in
    host memory, and the host does not wait for the device.

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
    on_host = torch.tensor(starts, dtype=torch.int32)
    cu_seqlens = to_device(on_host, device)
    packed = PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    if attention == "engine":
        return packed
    chunks = [(length, length) for length in lengths]  # numbers of queries and of visible keys
    if context_size > 1:
        sizes = [length // (2 * context_size) for length in lengths]
        places = (context_rank, 2 * context_size - 1 - context_rank)
        chunks = [(size, (place + 1) * size) for size in sizes for place in places]
        in_turn = torch.cat([zigzag_index(on_host, rank, context_size) for rank in range(context_size)])
        gathered_T = torch.empty_like(in_turn)
        gathered_T[in_turn] = torch.arange(len(in_turn))
        firsts = [start for start in starts[:-1] for _ in places]
        keys = [gathered_T[first : first + num_keys] for first, (_, num_keys) in zip(firsts, chunks, strict=True)]
        packed.key_index_K = to_device(torch.cat(keys), device)
    if attention == "padded":
        packed.batches, packed.query_ranges, packed.key_ranges = _batch_chunks(chunks, device)
    else:
        for name, counts in (("chunk_starts_q", [q for q, _ in chunks]), ("chunk_starts_k", [k for _, k in chunks])):
            bounds = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
            setattr(packed, name, to_device(bounds, device))
        packed.longest_chunk = (max(q for q, _ in chunks), max(k for _, k in chunks))
    return packed


def _batch_chunks(
    chunks: Sequence[tuple[int, int]], device: torch.device
) -> tuple[tuple[ChunkBatch, ...], PaddedRanges, PaddedRanges]:
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
    batches = tuple(ChunkBatch(len(batch), *chunks[batch[0]]) for batch in members)
    ranges = [_pad_ranges([chunk[side] for chunk in chunks], members, device) for side in (0, 1)]
    return batches, ranges[0], ranges[1]


def _pad_ranges(lengths: Sequence[int], members: Sequence[Sequence[int]], device: torch.device) -> PaddedRanges:
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
    return PaddedRanges(to_device(torch.cat(tokens), device), to_device(positions_T, device))
