"""Answers of any length → micro-batches of packed sequences (THD layout), balanced over data-parallel ranks.

:func:`plan_micro_batches` decides which sequences go where, from their lengths alone; :func:`pack` lays one micro-batch out.
Both are deterministic and know nothing of processes: every rank computes the same plan and packs its own part.

Shapes: T tokens of a pack, padding included; N loss tokens; R rows; S sequences, the padding counted as one.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nft_megatron.errors import UserError

PAD_TOKEN = 0
"""Fills up a pack. Any id of the vocabulary does: nothing attends to it and it carries no loss."""


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence to train on: the token ids (integers, 1-D) of a prompt, at least one, and of its answer."""

    prompt_tokens: np.ndarray
    answer_tokens: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_tokens) + len(self.answer_tokens)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Sequences laid end to end; token t of answer i is predicted at the position just before it.

    input_ids_T: prompt, answer, prompt, answer … and padding (int64). position_ids_T: position in the own sequence (int64).
    cu_seqlens: where each sequence starts, and T (int32). A padding, if any, is the last sequence.
    loss_positions_N: indices into T whose next token is an answer token (int64), ascending.
    targets_N: that answer token (int64). row_N: its row in the order given to :func:`pack` (int64), so that
    ``quantity_R[row_N]`` expands what belongs to a row to its loss tokens.

    >>> batch = pack([Row(np.array([5, 6]), np.array([7, 8])), Row(np.array([5]), np.array([9]))], multiple=4)
    >>> batch.input_ids_T.tolist(), batch.cu_seqlens.tolist()
    ([5, 6, 7, 8, 5, 9, 0, 0], [0, 4, 6, 8])
    >>> batch.loss_positions_N.tolist(), batch.targets_N.tolist(), batch.row_N.tolist()
    ([1, 2, 4], [7, 8, 9], [0, 0, 1])
    """

    input_ids_T: Tensor
    position_ids_T: Tensor
    cu_seqlens: Tensor
    loss_positions_N: Tensor
    targets_N: Tensor
    row_N: Tensor

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on ``device``."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def pack(rows: Sequence[Row], *, multiple: int = 1, num_tokens: int | None = None) -> PackedBatch:
    """Lay ``rows`` end to end, padded to ``num_tokens``, or else to the next multiple of ``multiple`` (at least one).

    No rows at all give a pack of padding without a loss token, so that a rank without work can still run its step.
    """
    lengths_R = [row.num_tokens for row in rows]
    num_real = sum(lengths_R)
    if num_tokens is None:
        num_tokens = max(multiple, -(-num_real // multiple) * multiple)
    assert num_real <= num_tokens, (num_real, num_tokens)
    assert num_tokens % multiple == 0, (num_tokens, multiple)
    assert all(len(row.prompt_tokens) for row in rows), "the first answer token needs a token before it"

    lengths_S = np.array([*lengths_R, num_tokens - num_real] if num_tokens > num_real else lengths_R, dtype=np.int64)
    starts_S = np.cumsum(lengths_S) - lengths_S
    padding = np.full(num_tokens - num_real, PAD_TOKEN)
    answer_lengths_R = np.array([len(row.answer_tokens) for row in rows], dtype=np.int64)
    first_loss_R = starts_S[: len(rows)] + np.array([len(row.prompt_tokens) for row in rows], dtype=np.int64) - 1
    return PackedBatch(
        input_ids_T=_int64([*(part for row in rows for part in (row.prompt_tokens, row.answer_tokens)), padding]),
        position_ids_T=_int64([np.arange(length) for length in lengths_S]),
        cu_seqlens=torch.from_numpy(np.append(starts_S, num_tokens).astype(np.int32)),
        loss_positions_N=_int64(
            [first + np.arange(count) for first, count in zip(first_loss_R, answer_lengths_R, strict=True)]
        ),
        targets_N=_int64([row.answer_tokens for row in rows]),
        row_N=torch.from_numpy(np.repeat(np.arange(len(rows)), answer_lengths_R)),
    )


def plan_micro_batches(
    lengths: Sequence[int] | np.ndarray,
    *,
    token_budget: int,
    num_ranks: int,
    multiple: int = 1,
    hidden_size: int = 4096,
) -> list[list[np.ndarray]]:
    """Which sequences each rank packs together: ``plan[rank][micro_batch]`` are ascending indices into ``lengths``.

    Every sequence is in exactly one micro-batch. Every rank has the same number of micro-batches (some may be empty), as few
    as the budget allows for the rank that needs most, with as equal token counts as that number allows, largest first.
    Ranks have equal :func:`sequence_cost` as nearly as longest-first assignment makes it. A micro-batch padded to
    ``multiple`` stays within ``token_budget``.

    Raises:
        UserError: a sequence alone is longer than the budget.

    >>> plan_micro_batches([5, 3, 4, 2], token_budget=7, num_ranks=2)
    [[array([0, 3])], [array([1, 2])]]
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    most_units = token_budget // multiple
    if len(lengths) and lengths.max() > most_units * multiple:
        raise UserError(
            "train.micro_batch_tokens",
            token_budget,
            f"a sequence has {lengths.max()} tokens" + (f" and packs are multiples of {multiple}" if multiple > 1 else ""),
            f"raise it to at least {-(-lengths.max() // multiple) * multiple}, or shorten the answers",
        )
    ranks = _balance(lengths, sequence_cost(lengths, hidden_size), num_ranks)

    def bins_of_all_ranks(units: int) -> list[list[list[int]]]:
        return [_best_fit(lengths, longest_first, units * multiple) for longest_first in ranks]

    # As few micro-batches as the budget allows; then the smallest capacity that needs no more of them evens them out
    # (MULTIFIT: Coffman, Garey and Johnson 1978).
    num_micro_batches = max(len(bins) for bins in bins_of_all_ranks(most_units))
    candidates = range(-(-int(lengths.max(initial=0)) // multiple), most_units)
    smallest = bisect_left(candidates, True, key=lambda u: max(map(len, bins_of_all_ranks(u))) <= num_micro_batches)
    plan = []
    for bins in bins_of_all_ranks(candidates.start + smallest):
        arrays = [np.sort(np.array(members, dtype=np.int64)) for members in bins]
        arrays.sort(key=lambda members: -lengths[members].sum())
        plan.append(arrays + [np.empty(0, dtype=np.int64)] * (num_micro_batches - len(arrays)))
    return plan


def sequence_cost(lengths: np.ndarray, hidden_size: int) -> np.ndarray:
    """Relative cost of training on sequences, in tokens of zero context: length·(1 + length / (12·hidden_size)).

    A dense transformer layer has about 12·hidden² weights, so 24·hidden² FLOPs a token; causal attention adds
    2·hidden·length. Both are the same in proportion for the backward pass.

    >>> sequence_cost(np.array([1200, 12000]), hidden_size=1000)
    array([ 1320., 24000.])
    """
    return lengths * (1 + lengths / (12 * hidden_size))


def _balance(lengths: np.ndarray, costs: np.ndarray, num_ranks: int) -> list[list[int]]:
    """Sequence indices of each rank, longest first: each goes to the rank with the least cost so far."""
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    heap = [(0.0, rank) for rank in range(num_ranks)]
    for index in np.argsort(-lengths, kind="stable").tolist():
        cost, rank = heap[0]
        ranks[rank].append(index)
        heapq.heapreplace(heap, (cost + float(costs[index]), rank))
    return ranks


def _best_fit(lengths: np.ndarray, longest_first: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each sequence goes where it leaves the least room, or to a new bin."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for index in longest_first:
        length = int(lengths[index])
        place = bisect_left(rooms, (length, 0))
        if place == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room, number = rooms.pop(place)
        bins[number].append(index)
        insort(rooms, (room - length, number))
    return bins


def _int64(parts: Sequence[np.ndarray]) -> Tensor:
    """The parts, perhaps none, as one int64 tensor."""
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *parts]).astype(np.int64))
