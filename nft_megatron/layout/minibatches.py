"""The answers of a rollout step → mini-batches → micro-batches of every data-parallel rank. Pure: all ranks compute the same.

A mini-batch, one optimizer step, is a random part of the step's questions with all their answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nft_megatron.layout.denominator import Denominator, loss_denominator
from nft_megatron.layout.packing import plan_micro_batches


@dataclass(frozen=True)
class Layout:
    """What the plan depends on besides the answers. ``multiple``: packs are padded to it."""

    num_updates: int
    num_ranks: int
    token_budget: int
    multiple: int
    hidden_size: int
    denominator: Denominator
    seed: int


@dataclass(frozen=True, eq=False)
class MiniBatchPlan:
    """``rows_of[rank][micro_batch]`` are indices into the arrays given to :func:`plan_minibatches`; every rank has as many."""

    rows_of: list[list[np.ndarray]]
    denominator: float
    num_tokens: int


def plan_minibatches(
    group_id: np.ndarray, lengths: np.ndarray, answer_lengths: np.ndarray, step: int, layout: Layout
) -> list[MiniBatchPlan]:
    """Split rows (one an answer to train on: its group, its tokens with and without the prompt) into mini-batches.

    There are ``num_updates`` of them, fewer if there are fewer groups; their numbers of groups differ by at most one.
    Which groups meet depends on (seed, step) alone, not on ranks or budgets.
    """
    groups = np.unique(group_id)
    order = np.random.default_rng([layout.seed, step]).permutation(groups)
    parts = np.array_split(order, min(layout.num_updates, len(groups)))
    return [_plan(np.flatnonzero(np.isin(group_id, part)), lengths, answer_lengths, layout) for part in parts]


def _plan(rows: np.ndarray, lengths: np.ndarray, answer_lengths: Sequence[int] | np.ndarray, layout: Layout) -> MiniBatchPlan:
    micro_batches = plan_micro_batches(
        lengths[rows],
        token_budget=layout.token_budget,
        num_ranks=layout.num_ranks,
        multiple=layout.multiple,
        hidden_size=layout.hidden_size,
    )
    own_lengths = np.asarray(answer_lengths)[rows]
    return MiniBatchPlan(
        rows_of=[[rows[members] for members in rank] for rank in micro_batches],
        denominator=loss_denominator(layout.denominator, own_lengths.tolist()),
        num_tokens=int(own_lengths.sum()),
    )
