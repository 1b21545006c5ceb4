"""The answers of a rollout step → mini-batches → micro-batches of every data-parallel rank. Pure: all ranks compute the same.

A mini-batch, one optimizer step, is a random part of the step's questions with all their answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nft_megatron.base.errors import UserError
from nft_megatron.batching.denominator import Denominator, loss_denominator
from nft_megatron.batching.packing import plan_micro_batches
from nft_megatron.config.schema import Config


@dataclass(frozen=True)
class Layout:
    """What the plan depends on besides the answers.

    num_ranks: data-parallel ranks. token_budget: of a micro-batch over all its context-parallel ranks.
    count_multiple: micro-batches of a mini-batch are a multiple of it; the interleaved pipeline schedule needs its stages.
    pad_to_budget: every pack has exactly ``token_budget`` tokens, otherwise it ends at the next multiple of ``multiple``.
    keep_groups: all answers of a group are in one micro-batch, for losses that couple them.
    length_limit: tokens at which answers are cut, for rewards that depend on it; 0 where none does.

    Raises:
        UserError: ``pad_to_budget`` with a budget that no pack can have.
    """

    num_updates: int
    num_ranks: int
    token_budget: int
    hidden_size: int
    denominator: Denominator
    seed: int
    tensor_size: int
    context_size: int
    count_multiple: int
    pad_to_budget: bool
    keep_groups: bool = False
    length_limit: int = 0

    @classmethod
    def of(
        cls,
        config: Config,
        hidden_size: int,
        *,
        data: int,
        tensor: int,
        context: int,
        pipeline: int,
        virtual_pipeline: int,
        token_budget: int,
    ) -> Layout:
        """What ``config`` says, on so many ranks of each kind: for training, and for a plan that tries other numbers."""
        return cls(
            num_updates=config.train.updates_per_step,
            num_ranks=data,
            token_budget=token_budget,
            hidden_size=hidden_size,
            denominator=config.train.denominator,
            seed=config.seed,
            tensor_size=tensor,
            context_size=context,
            count_multiple=pipeline if virtual_pipeline > 1 else 1,
            pad_to_budget=config.train.pad_to_budget,
            keep_groups=config.algorithm.coupling == "group",
            length_limit=config.rollout.max_answer_tokens,
        )

    def __post_init__(self) -> None:
        if self.pad_to_budget and self.token_budget % self.multiple:
            below = self.token_budget // self.multiple * self.multiple
            raise UserError(
                "train.micro_batch_tokens",
                self.token_budget,
                f"packs are padded to it (train.pad_to_budget), but with parallel.tensor = {self.tensor_size} and "
                f"parallel.context = {self.context_size} their tokens are multiples of {self.multiple}",
                f"use {below} or {below + self.multiple}" if below else f"use {self.multiple}",
            )

    @property
    def sequence_multiple(self) -> int:
        """Every sequence is padded to it: each context-parallel rank holds two equal chunks, so 2 · context_size."""
        return 2 * self.context_size if self.context_size > 1 else 1

    @property
    def multiple(self) -> int:
        """Every pack is padded to it: sequence parallelism splits a context-parallel rank's part over tensor ranks."""
        return self.sequence_multiple * self.tensor_size

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt and answer that any pack has room for."""
        return self.token_budget // self.multiple * self.multiple


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
        sequence_multiple=layout.sequence_multiple,
        count_multiple=layout.count_multiple,
        groups=answers.group_id[rows] if layout.keep_groups else None,
        hidden_size=layout.hidden_size,
    )
    return MiniBatchPlan(
        rows_of=[[rows[members] for members in rank] for rank in micro_batches],
        denominator=loss_denominator(layout.denominator, answers.answer_lengths[is_member].tolist()),
        num_tokens=int(answers.answer_lengths[rows].sum()),
    )
