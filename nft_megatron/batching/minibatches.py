"""A step's answers → mini-batches → micro-batches of every data-parallel rank. Pure: all ranks compute the same plan.

A mini-batch, one optimizer step, is a random part of the step's answers, or of its questions with all their answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from nft_megatron.base.errors import UserError
from nft_megatron.batching.denominator import Denominator, loss_denominator
from nft_megatron.batching.packing import plan_micro_batches, round_up
from nft_megatron.config.schema import Config

if TYPE_CHECKING:
    from nft_megatron.data.ledger import LedgerIndex


@dataclass(frozen=True)
class BatchingRules:
    """How a step's answers are split into mini-batches, micro-batches and packs: all that the plan depends on besides them.

    num_ranks: data-parallel ranks. token_budget: tokens of a micro-batch over all its context-parallel ranks.
    count_multiple: the number of micro-batches per mini-batch is a multiple of it; the interleaved pipeline schedule needs a
    multiple of its stages.
    pad_to_budget: every pack has exactly ``token_budget`` tokens; otherwise it is padded to the next multiple of ``multiple``.
    minibatch_of: what is dealt out over the mini-batches. Answers to one question have correlated gradients, so a mini-batch of
    answers to many questions has the less noisy one.
    keep_groups: all answers of a group are in one micro-batch, for losses that couple them.
    length_limit: tokens at which answers are truncated, for rewards that depend on it; 0 if none does.
    old_logprobs: ``train.old_logprobs``, whose log-probs are π_old for answers of the current weights.

    Raises:
        UserError: for ``pad_to_budget`` with a budget that no pack can have.

    >>> sizes = {"num_updates": 16, "num_ranks": 8, "count_multiple": 1, "hidden_size": 3584}
    >>> rules = BatchingRules(
    ...     **sizes, token_budget=16390, denominator="tokens", seed=0, tensor_size=2, context_size=2, pad_to_budget=False
    ... )
    >>> rules.sequence_multiple, rules.multiple, rules.longest_sequence
    (4, 8, 16384)
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
    minibatch_of: Literal["answers", "questions"] = "answers"
    keep_groups: bool = False
    length_limit: int = 0
    old_logprobs: Literal["recompute", "engine"] = "recompute"

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
    ) -> BatchingRules:
        """The rules of ``config`` for the given parallel sizes: those of training, or others that a plan tries."""
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
            minibatch_of=config.minibatch_of,
            keep_groups=config.algorithm.coupling == "group",
            length_limit=config.rollout.max_answer_tokens,
            old_logprobs=config.train.old_logprobs,
        )

    def __post_init__(self) -> None:
        if self.pad_to_budget and self.token_budget % self.multiple:
            below = self.token_budget // self.multiple * self.multiple
            raise UserError(
                "train.micro_batch_tokens",
                self.token_budget,
                f"packs are padded to it (train.pad_to_budget), but with parallel.tensor = {self.tensor_size} and "
                f"parallel.context = {self.context_size} it must be a multiple of {self.multiple}",
                f"use {below} or {below + self.multiple}" if below else f"use {self.multiple}",
            )

    @property
    def sequence_multiple(self) -> int:
        """Every sequence is padded to a multiple of this: 2 · context_size, as each context rank holds two equal chunks."""
        return 2 * self.context_size if self.context_size > 1 else 1

    @property
    def multiple(self) -> int:
        """Every pack is padded to a multiple of this: sequence parallelism splits a context rank's part over tensor ranks."""
        return self.sequence_multiple * self.tensor_size

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt and answer that fit into a pack."""
        return self.token_budget // self.multiple * self.multiple


@dataclass(frozen=True, eq=False)
class MiniBatchPlan:
    """``members_of[rank][micro_batch]`` are positions among the answers; all ranks have equally many micro-batches.

    ``denominator`` is D of contract 1; ``num_tokens`` counts the forwarded answer tokens on all ranks.
    """

    members_of: list[list[np.ndarray]]
    denominator: float
    num_tokens: int


def plan_minibatches(answers: LedgerIndex, is_forwarded: np.ndarray, step: int, rules: BatchingRules) -> list[MiniBatchPlan]:
    """Split a step's judged answers into mini-batches.

    There are ``num_updates`` of them, or fewer if there are fewer answers (groups, with ``minibatch_of`` = questions); the
    numbers of answers (groups) in them differ by at most one. Which ones meet depends only on (seed, step), not on ranks or
    budgets. Empty answers are left out.

    ``is_forwarded`` is False for an answer that cannot contribute to the loss (a wrong one under RFT): it counts in D, since a
    token with zero loss is still a token, but is in no micro-batch.
    """
    has_tokens = answers.answer_length > 0
    unit_A = answers.group_id if rules.minibatch_of == "questions" else np.arange(len(has_tokens))
    units = np.unique(unit_A[has_tokens])
    order = np.random.default_rng([rules.seed, step]).permutation(units)
    parts = np.array_split(order, min(rules.num_updates, len(units)))
    return [_plan(answers, np.isin(unit_A, part) & has_tokens, is_forwarded, rules) for part in parts]


def _plan(answers: LedgerIndex, is_member: np.ndarray, is_forwarded: np.ndarray, rules: BatchingRules) -> MiniBatchPlan:
    forwarded = np.flatnonzero(is_member & is_forwarded)
    micro_batches = plan_micro_batches(
        (answers.prompt_length + answers.answer_length)[forwarded],
        token_budget=rules.token_budget,
        num_ranks=rules.num_ranks,
        multiple=rules.multiple,
        sequence_multiple=rules.sequence_multiple,
        count_multiple=rules.count_multiple,
        groups=answers.group_id[forwarded] if rules.keep_groups else None,
        hidden_size=rules.hidden_size,
    )
    return MiniBatchPlan(
        members_of=[[forwarded[members] for members in rank] for rank in micro_batches],
        denominator=loss_denominator(rules.denominator, answers.answer_length[is_member].tolist()),
        num_tokens=int(answers.answer_length[forwarded].sum()),
    )


def plan_recomputing(
    plans: Sequence[MiniBatchPlan], is_stale_A: np.ndarray, data_rank: int, rules: BatchingRules
) -> list[list[bool]]:
    """For each mini-batch and micro-batch of a rank, whether the pass for old log-probs goes through it.

    It goes through every micro-batch that has an answer of the current weights, and then, from the last one backwards, through
    as many others as make the number equal on all ranks, which may share experts, and a multiple of ``count_multiple``. With
    ``old_logprobs`` = "engine" there is no such pass.

    >>> pack, empty = np.array([0]), np.empty(0, dtype=np.int64)
    >>> plan = MiniBatchPlan(members_of=[[pack, empty], [np.array([1]), empty]], denominator=1.0, num_tokens=9)
    >>> rules = BatchingRules(1, 2, 64, 8, "tokens", 0, tensor_size=1, context_size=1, count_multiple=1, pad_to_budget=False)
    >>> [plan_recomputing([plan], np.array([False, True]), rank, rules) for rank in range(2)]
    [[[True, False]], [[False, True]]]
    """
    if rules.old_logprobs == "engine":
        return [[False] * len(plan.members_of[data_rank]) for plan in plans]

    def of_rank(rank: int) -> np.ndarray:
        return np.array([not is_stale_A[members].all() for plan in plans for members in plan.members_of[rank]], dtype=bool)

    most = max(int(of_rank(rank).sum()) for rank in range(rules.num_ranks))
    own = of_rank(data_rank)
    others = np.flatnonzero(~own)[::-1]
    own[others[: round_up(most, rules.count_multiple) - int(own.sum())]] = True
    sizes = [len(plan.members_of[data_rank]) for plan in plans]
    return [part.tolist() for part in np.split(own, np.cumsum(sizes)[:-1])]
