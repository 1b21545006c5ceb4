"""The part of a pack that one context-parallel rank holds, in Transformer Engine's order.

With c ranks, every padded sequence of L tokens is cut into 2c chunks of L / 2c. Rank r holds chunk r and then chunk 2c − 1 − r
of every sequence, sequences in order: an early chunk, whose queries see few keys, and a late one, whose queries see many. So
under a causal mask all ranks do equal work (Transformer Engine's `thd_get_partitioned_indices`).

Targets and per-token quantities are packed first and then sliced here, never shifted after slicing: the token that follows a
chunk is on another rank.

Shapes: T tokens of a pack, N loss tokens, S sequences; of these a rank holds its local part.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nft_megatron.batching.packing import PackedBatch


def zigzag_index(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """The positions of ``rank``'s tokens in the whole pack: ascending (int64, [T / size]), on the device of ``cu_seqlens``.

    Every token belongs to exactly one rank. With ``size`` 1 sequences may have any length; otherwise each must be a multiple
    of 2 · ``size``.

    >>> cu_seqlens = torch.tensor([0, 8, 12])
    >>> zigzag_index(cu_seqlens, 0, 2).tolist(), zigzag_index(cu_seqlens, 1, 2).tolist()
    ([0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10])
    """
    lengths_S = cu_seqlens.long().diff()
    assert size == 1 or not (lengths_S % (2 * size)).any(), (lengths_S.tolist(), size)
    chunks_2 = torch.tensor([rank, 2 * size - 1 - rank], device=cu_seqlens.device)
    starts, ends = (
        (cu_seqlens[:-1, None] + lengths_S[:, None] * chunks // (2 * size)).flatten() for chunks in (chunks_2, chunks_2 + 1)
    )
    counts = ends - starts
    shifts = torch.repeat_interleave(starts - counts.cumsum(0) + counts, counts)
    return shifts + torch.arange(len(shifts), device=cu_seqlens.device)


def context_shard(packed: PackedBatch, rank: int, size: int) -> tuple[PackedBatch, Tensor]:
    """The part of ``packed`` that context-parallel ``rank`` holds, and ``kept_N``.

    The part keeps the whole pack's ``cu_seqlens``; its ``loss_positions_N`` are ascending indices into the local tokens.
    kept_N: indices of the whole pack's loss tokens that are local (int64, ascending); ``quantity_N[kept_N]`` slices any other
    per-token quantity. With ``size`` 1: the pack itself and all of its loss tokens.
    """
    if size == 1:
        return packed, torch.arange(len(packed.targets_N), device=packed.targets_N.device)
    index = zigzag_index(packed.cu_seqlens, rank, size)
    place = torch.searchsorted(index, packed.loss_positions_N)  # of each loss token among the local ones, if local
    kept_N = (index[place.clamp(max=len(index) - 1)] == packed.loss_positions_N).nonzero().flatten()
    local = replace(
        packed,
        input_ids_T=packed.input_ids_T[index],
        position_ids_T=packed.position_ids_T[index],
        loss_positions_N=place[kept_N],
        targets_N=packed.targets_N[kept_N],
        answer_N=packed.answer_N[kept_N],
    )
    return local, kept_N
