"""The answers of a rollout step → mini-batches → micro-batches of every data-parallel rank. Pure: all ranks compute the same.

A mini-batch, one optimizer step, is a random part of the step's questions with all their answers.
"""

from __future__ import annotations

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
class Answers:
    """The judged answers of a step's groups, as numpy arrays with one entry an answer.

    ``lengths`` are tokens of prompt and answer. ``is_forwarded`` is False for an answer that cannot contribute to the loss (a
    wrong one under RFT): it is in D, the loss of a token that is zero still being a token, but in no micro-batch.
    """

    group_id: np.ndarray
    lengths: np.ndarray
    answer_lengths: np.ndarray
    is_forwarded: np.ndarray


@dataclass(frozen=True, eq=False)
class MiniBatchPlan:
    """``rows_of[rank][micro_batch]`` are indices into the :class:`Answers`; every rank has as many micro-batches.

    ``denominator`` is D of contract 1; ``num_tokens`` counts the answer tokens that are forwarded, on all ranks.
    """

    rows_of: list[list[np.ndarray]]
    denominator: float
    num_tokens: int


def plan_minibatches(answers: Answers, step: int, layout: Layout) -> list[MiniBatchPlan]:
    """Split a step's answers into mini-batches.

    There are ``num_updates`` of them, fewer if there are fewer groups; their numbers of groups differ by at most one.
    Which groups meet depends on (seed, step) alone, not on ranks or budgets.
    """
    groups = np.unique(answers.group_id)
    order = np.random.default_rng([layout.seed, step]).permutation(groups)
    parts = np.array_split(order, min(layout.num_updates, len(groups)))
    return [_plan(answers, np.isin(answers.group_id, part), layout) for part in parts]


def _plan(answers: Answers, is_member: np.ndarray, layout: Layout) -> MiniBatchPlan:
    rows = np.flatnonzero(is_member & answers.is_forwarded)
    micro_batches = plan_micro_batches(
        answers.lengths[rows],
        token_budget=layout.token_budget,
        num_ranks=layout.num_ranks,
        multiple=layout.multiple,
        hidden_size=layout.hidden_size,
    )
    return MiniBatchPlan(
        rows_of=[[rows[members] for members in rank] for rank in micro_batches],
        denominator=loss_denominator(layout.denominator, answers.answer_lengths[is_member].tolist()),
        num_tokens=int(answers.answer_lengths[rows].sum()),
    )
