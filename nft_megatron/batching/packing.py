"""Answers of any length → micro-batches of packed sequences (THD layout), balanced over data-parallel ranks.

:func:`plan_micro_batches` assigns sequences to micro-batches by their lengths alone; :func:`pack` lays out one micro-batch.
Both are deterministic and know nothing about processes: every rank computes the same plan and packs its own part. For any
lengths, ranks and multiples:

1. Every loss token is in exactly one pack, with its target; padding has no loss tokens.
2. A pack, padding included, stays within the budget; its length and those of its sequences are the required multiples.
3. Every rank has the same number of micro-batches.
4. Sequences of one group are in one micro-batch.

Shapes: T tokens of a pack, padding included; N loss tokens; A answers; S sequences of a pack, its final padding counted as one,
or all sequences of a plan; I items of a plan, each a sequence or a group of sequences.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import AnswerTokens
from nft_megatron.batching.device import to_device

Count = TypeVar("Count", int, np.ndarray)

PAD_TOKEN = 0
"""Pads a pack. Any id in the vocabulary works: nothing attends to it and it carries no loss."""


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Sequences laid end to end; each answer token is predicted at the position just before it.

    input_ids_T: prompt, answer, padding, prompt, answer, padding … (int64). A sequence's padding is at its end, where the
    causal mask hides it from the real tokens. position_ids_T: position within the sequence, padding included (int64).
    cu_seqlens: the start of each sequence, then T (int32), always in host memory. Padding of the pack, if any, is the last
    sequence.
    loss_positions_N: indices into T whose next token is an answer token (int64), ascending.
    targets_N: that answer token (int64). answer_N: its answer in the order given to :func:`pack` (int64), so that
    ``quantity_A[answer_N]`` expands per-answer values to loss tokens.

    >>> first, second = np.array([-0.1, -0.2]), np.array([-0.3])
    >>> answers = [AnswerTokens(np.array([5, 6]), np.array([7, 8]), first), AnswerTokens(np.array([5]), np.array([9]), second)]
    >>> batch = pack(answers, multiple=4)
    >>> batch.input_ids_T.tolist(), batch.cu_seqlens.tolist()
    ([5, 6, 7, 8, 5, 9, 0, 0], [0, 4, 6, 8])
    >>> batch.loss_positions_N.tolist(), batch.targets_N.tolist(), batch.answer_N.tolist()
    ([1, 2, 4], [7, 8, 9], [0, 0, 1])
    """

    input_ids_T: Tensor
    position_ids_T: Tensor
    cu_seqlens: Tensor
    loss_positions_N: Tensor
    targets_N: Tensor
    answer_N: Tensor

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sequence."""
        return self.cu_seqlens.diff().tolist()

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with its tensors, but for ``cu_seqlens``, on ``device``."""
        moved: dict[str, Any] = {name: to_device(value, device) for name, value in vars(self).items() if name != "cu_seqlens"}
        return replace(self, **moved)


def pack(
    answers: Sequence[AnswerTokens], *, multiple: int = 1, sequence_multiple: int = 1, num_tokens: int | None = None
) -> PackedBatch:
    """Lay prompts and ``answers`` end to end, each padded to the next multiple of ``sequence_multiple``.

    The pack is padded to ``num_tokens`` if given, else to the next multiple of ``multiple`` (at least one of it), which must be
    a multiple of ``sequence_multiple``. Without answers the pack is all padding and has no loss token, so that a rank without
    work can still run its step.

    >>> logprob = np.array([-0.1])
    >>> answers = [AnswerTokens(np.array([5, 6]), np.array([7]), logprob), AnswerTokens(np.array([5]), np.array([9]), logprob)]
    >>> batch = pack(answers, multiple=8, sequence_multiple=2)
    >>> batch.input_ids_T.tolist(), batch.cu_seqlens.tolist()
    ([5, 6, 7, 0, 5, 9, 0, 0], [0, 4, 6, 8])
    >>> batch.position_ids_T.tolist(), batch.loss_positions_N.tolist()
    ([0, 1, 2, 3, 0, 1, 0, 1], [1, 4])
    """
    assert multiple % sequence_multiple == 0, (multiple, sequence_multiple)
    assert all(len(answer.prompt_tokens) for answer in answers), "the first answer token needs a token before it"
    answer_lengths_A = np.array([len(answer.answer_tokens) for answer in answers], dtype=np.int64)
    real_A = np.array([len(answer.prompt_tokens) for answer in answers], dtype=np.int64) + answer_lengths_A
    padded_A = round_up(real_A, sequence_multiple)
    num_used = int(padded_A.sum())
    if num_tokens is None:
        num_tokens = max(multiple, round_up(num_used, multiple))
    assert num_used <= num_tokens, (num_used, num_tokens)
    assert num_tokens % multiple == 0, (num_tokens, multiple)

    lengths_S = np.append(padded_A, num_tokens - num_used) if num_tokens > num_used else padded_A
    starts_S = np.cumsum(lengths_S) - lengths_S
    input_ids_T = np.full(num_tokens, PAD_TOKEN, dtype=np.int64)
    ends_A = starts_S[: len(answers)] + real_A
    for answer, start, end in zip(answers, starts_S, ends_A, strict=False):
        input_ids_T[start:end] = np.concatenate([answer.prompt_tokens, answer.answer_tokens])
    first_loss_A = ends_A - answer_lengths_A - 1
    return PackedBatch(
        input_ids_T=torch.from_numpy(input_ids_T),
        position_ids_T=_int64([np.arange(length) for length in lengths_S]),
        cu_seqlens=torch.from_numpy(np.append(starts_S, num_tokens).astype(np.int32)),
        loss_positions_N=_int64(
            [first + np.arange(count) for first, count in zip(first_loss_A, answer_lengths_A, strict=True)]
        ),
        targets_N=_int64([answer.answer_tokens for answer in answers]),
        answer_N=torch.from_numpy(np.repeat(np.arange(len(answers)), answer_lengths_A)),
    )


def plan_micro_batches(
    lengths: Sequence[int] | np.ndarray,
    *,
    token_budget: int,
    num_ranks: int,
    multiple: int = 1,
    sequence_multiple: int = 1,
    count_multiple: int = 1,
    groups: Sequence[int] | np.ndarray | None = None,
    hidden_size: int = 4096,
) -> list[list[np.ndarray]]:
    """Which sequences each rank packs together: ``plan[rank][micro_batch]`` are ascending indices into ``lengths``.

    Every sequence is in exactly one micro-batch; sequences with the same number in ``groups`` share one. All ranks have equally
    many micro-batches, at least one (some may be empty): the smallest multiple of ``count_multiple`` that the budget allows for
    the rank that needs most. Within a rank their token counts are as equal as that number allows, costliest first.
    Costliest-first assignment balances :func:`sequence_cost` over ranks. Sequences count with their padding to
    ``sequence_multiple``, and a micro-batch padded to ``multiple`` stays within ``token_budget``.

    Why costliest first: pipeline stages wait for each other when successive micro-batches differ, and sorted ones hardly do;
    the shortest ones drain the pipeline; and a pack too large for memory fails at once (`benchmarks/packing.py`).

    Raises:
        UserError: if a single sequence, or a group of them, exceeds the budget.

    >>> plan_micro_batches([5, 3, 4, 2], token_budget=7, num_ranks=2)
    [[array([0, 3])], [array([1, 2])]]
    >>> plan_micro_batches([2, 2, 2, 2], token_budget=8, num_ranks=1, groups=[7, 5, 7, 5], count_multiple=2)
    [[array([1, 3]), array([0, 2])]]
    """
    lengths_S = round_up(np.asarray(lengths, dtype=np.int64), sequence_multiple)
    names_I, item_S = np.unique(np.arange(len(lengths_S)) if groups is None else groups, return_inverse=True)
    tokens_I = np.bincount(item_S, weights=lengths_S, minlength=len(names_I)).astype(np.int64)
    cost_I = np.bincount(item_S, weights=sequence_cost(lengths_S, hidden_size), minlength=len(names_I))
    most_units = token_budget // multiple
    if tokens_I.max(initial=0) > most_units * multiple:
        raise _too_long(int(tokens_I.max()), token_budget, multiple, in_groups=groups is not None)
    ranks = [sorted(items, key=lambda item: -tokens_I[item]) for items in _balance(cost_I, num_ranks)]

    def bins_of_all_ranks(units: int) -> list[list[list[int]]]:
        return [_best_fit(tokens_I, largest_first, units * multiple) for largest_first in ranks]

    # Use as few micro-batches as the budget allows; then even them out by the smallest capacity that needs no more of them
    # (MULTIFIT: Coffman, Garey and Johnson 1978).
    num_micro_batches = round_up(max(1, *(len(bins) for bins in bins_of_all_ranks(most_units))), count_multiple)
    candidates = range(-(-int(tokens_I.max(initial=0)) // multiple), most_units)
    smallest = bisect_left(candidates, True, key=lambda u: max(map(len, bins_of_all_ranks(u))) <= num_micro_batches)
    members_I = np.split(np.argsort(item_S, kind="stable"), np.cumsum(np.bincount(item_S))[:-1])
    plan = []
    for bins in bins_of_all_ranks(candidates.start + smallest):
        bins.sort(key=lambda items: -cost_I[items].sum())
        arrays = [np.sort(np.concatenate([members_I[item] for item in items])) for items in bins]
        plan.append(arrays + [np.empty(0, dtype=np.int64)] * (num_micro_batches - len(arrays)))
    return plan


def sequence_cost(lengths: np.ndarray, hidden_size: int) -> np.ndarray:
    """Relative cost of training on sequences, in tokens of zero context: length·(1 + length / (12·hidden_size)).

    A dense transformer layer has about 12·hidden² weights, so 24·hidden² FLOPs per token; causal attention adds
    2·hidden·length. The ratio is the same in the backward pass.

    >>> sequence_cost(np.array([1200, 12000]), hidden_size=1000)
    array([ 1320., 24000.])
    """
    return lengths * (1 + lengths / (12 * hidden_size))


def _too_long(num_tokens: int, token_budget: int, multiple: int, in_groups: bool) -> UserError:
    what = "the answers to one question, which this algorithm keeps together, have" if in_groups else "a sequence has"
    return UserError(
        "train.micro_batch_tokens",
        token_budget,
        f"{what} {num_tokens} tokens" + (f" and packs are multiples of {multiple}" if multiple > 1 else ""),
        f"raise it to at least {round_up(num_tokens, multiple)}, or lower rollout.max_answer_tokens"
        + (" or rollout.group_size" if in_groups else ""),
    )


def _balance(cost_I: np.ndarray, num_ranks: int) -> list[list[int]]:
    """The items of each rank: costliest first, each to the rank with the lowest cost so far."""
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    heap = [(0.0, rank) for rank in range(num_ranks)]
    for item in np.argsort(-cost_I, kind="stable").tolist():
        cost, rank = heap[0]
        ranks[rank].append(item)
        heapq.heapreplace(heap, (cost + float(cost_I[item]), rank))
    return ranks


def _best_fit(tokens_I: np.ndarray, largest_first: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each item goes into the bin where it leaves the least room, or into a new one."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for item in largest_first:
        tokens = int(tokens_I[item])
        place = bisect_left(rooms, (tokens, 0))
        if place == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room, number = rooms.pop(place)
        bins[number].append(item)
        insort(rooms, (room - tokens, number))
    return bins


def round_up(count: Count, multiple: int) -> Count:
    """The next multiple, or ``count`` itself if it is one."""
    return -(-count // multiple) * multiple


def _int64(parts: Sequence[np.ndarray]) -> Tensor:
    """The parts, possibly none, as one int64 tensor."""
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *parts]).astype(np.int64))
