"""From a step's ledger to one rank's packed mini-batches, with everything the loss needs for each token.

Suffix ``_N``: one entry per loss token of a micro-batch; ``_A``: one per judged answer, of the step or of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nft_megatron.algorithms import Algorithm, AnswerBatch
from nft_megatron.base.records import AnswerTokens
from nft_megatron.batching.context import context_shard
from nft_megatron.batching.device import to_device
from nft_megatron.batching.minibatches import BatchingRules, MiniBatchPlan, plan_minibatches, plan_recomputing
from nft_megatron.batching.packing import PackedBatch, pack
from nft_megatron.data.ledger import LedgerIndex


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """A pack and what its loss needs for each token. ``weight_N`` is ω/D; ``is_stale_N`` marks answers from older weights.

    ``old_logprob_N`` is log π of the policy that answered: recomputed at the start of the step, or the engine's own if the
    answer is older than the weights. The trainer fills it in, only on the last pipeline stage. ``recomputes``: whether the pass
    for old log-probs goes through this pack; else the engine's are taken for all of it. ``has_stale``: whether any answer is
    stale, known to the host. ``advantage_N`` is set for algorithms with advantages, ``answers`` for those whose loss depends on
    whole answers.

    >>> logprob_N = np.array([-0.1, -0.7], dtype=np.float32)
    >>> packed = pack([AnswerTokens(np.array([5, 6]), np.array([7, 8]), logprob_N)])
    >>> ones_N = torch.ones(2)
    >>> batch = MicroBatch(packed, ones_N / 2, ones_N > 0, ones_N / 2, torch.from_numpy(logprob_N), ones_N > 1)
    >>> batch.weight_N.sum()
    tensor(1.)
    """

    packed: PackedBatch
    weight_N: Tensor
    is_correct_N: Tensor
    correct_rate_N: Tensor
    engine_logprob_N: Tensor
    is_stale_N: Tensor
    old_logprob_N: Tensor | None = None
    advantage_N: Tensor | None = None
    answers: AnswerBatch | None = None
    recomputes: bool = True
    has_stale: bool = False


@dataclass(frozen=True)
class MiniBatch:
    """One optimizer step: this rank's micro-batches. ``num_tokens`` counts all ranks.

    ``measures_cosine``: whether this update measures the angle between the gradients of right and wrong answers.
    ``measures_mismatch``: whether it measures how far the engine's log-probs are from the trainer's, as it is the first one and
    no pass for old log-probs did.

    >>> MiniBatch(micro_batches=(), num_tokens=0).measures_cosine
    False
    """

    micro_batches: tuple[MicroBatch, ...]
    num_tokens: int
    measures_cosine: bool = False
    measures_mismatch: bool = False


@dataclass(frozen=True, eq=False)
class StepPlan:
    """What every rank knows of a step before it reads tokens.

    ``index`` and ``answers``: the judged answers. ``minibatches``: who trains on which of them, as positions among them.
    """

    index: LedgerIndex
    answers: AnswerBatch
    minibatches: list[MiniBatchPlan]
    is_stale: np.ndarray

    def positions_of(self, data_rank: int) -> np.ndarray:
        """The answers that a data-parallel rank trains on, ascending."""
        members = [members for plan in self.minibatches for members in plan.members_of[data_rank]]
        return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *members]))


def plan_step(index: LedgerIndex, step: int, algorithm: Algorithm, rules: BatchingRules) -> StepPlan:
    """Who trains on which of a ledger's answers in ``step``.

    Raises:
        UserError: if a sequence exceeds the token budget.
    """
    index = index.take(np.flatnonzero((index.fate == "train") & (index.label != "unknown")))
    answers = _answers(index, algorithm, rules.length_limit)
    is_forwarded = index.is_correct | algorithm.uses_wrong_answers
    if answers.advantage_A is not None:
        is_forwarded &= (answers.advantage_A != 0).numpy()
    return StepPlan(index, answers, plan_minibatches(index, is_forwarded, step, rules), index.weight_version < step - 1)


def pack_minibatches(
    plan: StepPlan,
    tokens: Mapping[int, AnswerTokens],
    algorithm: Algorithm,
    rules: BatchingRules,
    data_rank: int,
    context_rank: int,
    device: torch.device,
) -> list[MiniBatch]:
    """The mini-batches of a step as one rank sees them. ``tokens``: of the answers at ``plan.positions_of(data_rank)``."""
    is_stale_A = torch.from_numpy(plan.is_stale)

    def micro_batch(members: np.ndarray, denominator: float, recomputes: bool) -> MicroBatch:
        positions = torch.from_numpy(members)
        own_tokens = [tokens[position] for position in members.tolist()]
        own_answers = plan.answers.take(positions)
        batch = _micro_batch(own_tokens, own_answers, is_stale_A[positions], algorithm, denominator, rules, context_rank)
        return _to(device, replace(batch, recomputes=recomputes, has_stale=bool(plan.is_stale[members].any())))

    def minibatch(of_all: MiniBatchPlan, recomputing: list[bool]) -> MiniBatch:
        own = zip(of_all.members_of[data_rank], recomputing, strict=True)
        return MiniBatch(tuple(micro_batch(members, of_all.denominator, each) for members, each in own), of_all.num_tokens)

    recomputing = plan_recomputing(plan.minibatches, plan.is_stale, data_rank, rules)
    return [minibatch(of_all, own) for of_all, own in zip(plan.minibatches, recomputing, strict=True)]


def _answers(index: LedgerIndex, algorithm: Algorithm, length_limit: int) -> AnswerBatch:
    """What is known of the judged answers in ``index`` before any forward pass, including ω and advantage."""
    answers = AnswerBatch(
        group_A=torch.from_numpy(np.unique(index.group_id, return_inverse=True)[1]),
        is_correct_A=torch.from_numpy(index.is_correct),
        correct_rate_A=torch.from_numpy(index.correct_rate),
        length_A=torch.from_numpy(index.answer_length).long(),
        is_truncated_A=torch.from_numpy(index.finish_reason == "length"),
        length_limit=length_limit,
    )
    return answers._replace(weight_A=algorithm.weight(answers), advantage_A=algorithm.advantage(answers))


def _micro_batch(
    tokens: Sequence[AnswerTokens],
    answers: AnswerBatch,
    is_stale_A: Tensor,
    algorithm: Algorithm,
    denominator: float,
    rules: BatchingRules,
    context_rank: int,
) -> MicroBatch:
    """Pack ``tokens`` and expand the values of their ``answers`` to this rank's loss tokens."""
    whole = pack(
        tokens,
        multiple=rules.multiple,
        sequence_multiple=rules.sequence_multiple,
        num_tokens=rules.token_budget if rules.pad_to_budget else None,
    )
    packed, kept_N = context_shard(whole, context_rank, rules.context_size)
    engine_logprobs = [answer.behaviour_logprobs for answer in tokens]
    assert answers.weight_A is not None
    weight_A, rate_A = torch.div(answers.weight_A, denominator).float(), answers.correct_rate_A.float()
    advantage_A = None if answers.advantage_A is None else answers.advantage_A.float()
    answers = answers._replace(weight_A=weight_A, correct_rate_A=rate_A, advantage_A=advantage_A)
    return MicroBatch(
        packed,
        weight_N=weight_A[packed.answer_N],
        is_correct_N=answers.is_correct_A[packed.answer_N],
        correct_rate_N=rate_A[packed.answer_N],
        engine_logprob_N=torch.from_numpy(np.concatenate([np.empty(0, dtype=np.float32), *engine_logprobs]))[kept_N],
        is_stale_N=is_stale_A[packed.answer_N],
        advantage_N=None if advantage_A is None else advantage_A[packed.answer_N],
        answers=answers if algorithm.coupling != "token" else None,
    )


def _to(device: torch.device, batch: MicroBatch) -> MicroBatch:
    """The same micro-batch with its tensors on ``device``."""
    moved: dict[str, Any] = {n: to_device(value, device) for n, value in vars(batch).items() if isinstance(value, Tensor)}
    answers = None if batch.answers is None else batch.answers.each(lambda value_A: to_device(value_A, device))
    return replace(batch, packed=batch.packed.to(device), answers=answers, **moved)
