"""From a step's ledger to one rank's packed mini-batches, with what the loss needs of every token.

Suffix ``_N``: one entry a loss token of a micro-batch; ``_R``: one an answer of it; ``_A``: one a judged answer of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nft_megatron.algorithms import Algorithm, AnswerBatch
from nft_megatron.base.records import AnswerTokens
from nft_megatron.batching.context import context_shard
from nft_megatron.batching.minibatches import Answers, Layout, plan_minibatches
from nft_megatron.batching.packing import PackedBatch, pack
from nft_megatron.data.ledger import LedgerIndex, read_index, read_tokens


class PackedAnswers(NamedTuple):
    """The answers of a pack, in its order, the same on all context-parallel ranks: what a loss of whole answers needs.

    ``weight_R`` is ω/D, ``length_R`` counts tokens, ``group_R`` (int64, from 0) is equal for the answers of one question.
    """

    weight_R: Tensor
    is_correct_R: Tensor
    correct_rate_R: Tensor
    length_R: Tensor
    group_R: Tensor
    advantage_R: Tensor | None

    def to(self, device: torch.device) -> PackedAnswers:
        return PackedAnswers(*(None if each is None else each.to(device) for each in self))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """A pack and what its loss needs of each token. ``weight_N`` is ω/D; ``is_stale_N`` marks answers of older weights.

    ``old_logprob_N`` is log π of the policy that answered: recomputed at the start of the step, or the engine's own where the
    answer is older than the weights. The trainer fills it, on the last pipeline stage only. ``advantage_N`` is there for
    algorithms that have advantages, ``answers`` for those whose loss is of whole answers.
    """

    packed: PackedBatch
    weight_N: Tensor
    is_correct_N: Tensor
    correct_rate_N: Tensor
    engine_logprob_N: Tensor
    is_stale_N: Tensor
    old_logprob_N: Tensor | None = None
    advantage_N: Tensor | None = None
    answers: PackedAnswers | None = None


@dataclass(frozen=True)
class MiniBatch:
    """One optimizer step: this rank's micro-batches; ``num_tokens`` is of all ranks.

    ``measures_cosine``: whether the update is to tell the angle between the gradients of right and of wrong answers.
    """

    micro_batches: tuple[MicroBatch, ...]
    num_tokens: int
    measures_cosine: bool = False


def read_minibatches(
    ledger: Path, step: int, algorithm: Algorithm, layout: Layout, data_rank: int, context_rank: int, device: torch.device
) -> list[MiniBatch]:
    """The mini-batches of ``step`` as one rank sees them. Only the tokens of its data-parallel rank's answers are read.

    Raises:
        UserError: the ledger is missing or damaged, or a sequence is longer than the layout's token budget.
    """
    index = read_index(ledger)
    is_judged = (index.fate == "train") & (index.label != "unknown")
    values = _values(index, np.flatnonzero(is_judged), algorithm, layout.length_limit)
    rows = np.flatnonzero(is_judged & (index.answer_length > 0))
    answers = Answers(
        group_id=index.group_id[rows],
        lengths=(index.prompt_length + index.answer_length)[rows],
        answer_lengths=index.answer_length[rows],
        is_forwarded=values.contributes[rows],
    )
    plans = plan_minibatches(answers, step, layout)
    own = [[rows[members] for members in plan.rows_of[data_rank]] for plan in plans]
    needed = np.concatenate([rows[:0], *(members for minibatch in own for members in minibatch)])
    tokens = dict(zip(needed.tolist(), read_tokens(ledger, needed), strict=True))

    def micro_batch(members: np.ndarray, denominator: float) -> MicroBatch:
        own_tokens = [tokens[row] for row in members.tolist()]
        return _micro_batch(index, members, own_tokens, values, step, algorithm, denominator, layout, context_rank)

    return [
        MiniBatch(tuple(_to(device, micro_batch(members, plan.denominator)) for members in minibatch), plan.num_tokens)
        for minibatch, plan in zip(own, plans, strict=True)
    ]


class _Values(NamedTuple):
    """What the algorithm says of the answers before any forward pass: float64 and bool, one entry a row of the ledger."""

    weight: Tensor
    advantage: Tensor | None
    contributes: np.ndarray


def _values(index: LedgerIndex, judged: np.ndarray, algorithm: Algorithm, length_limit: int) -> _Values:
    """ω and advantage of the ``judged`` rows, zero elsewhere, and which of them can have a loss."""
    answers = AnswerBatch(
        group_A=torch.from_numpy(np.unique(index.group_id[judged], return_inverse=True)[1]),
        is_correct_A=torch.from_numpy(index.is_correct[judged]),
        correct_rate_A=torch.from_numpy(index.correct_rate[judged]),
        length_A=torch.from_numpy(index.answer_length[judged]).long(),
        is_truncated_A=torch.from_numpy(index.finish_reason[judged] == "length"),
        length_limit=length_limit,
    )

    def of_all_rows(value_A: Tensor) -> Tensor:
        return value_A.new_zeros(len(index.row)).index_put((torch.from_numpy(judged),), value_A)

    weight, advantage_A = of_all_rows(algorithm.weight(answers)), algorithm.advantage(answers)
    contributes = index.is_correct | algorithm.uses_wrong_answers
    if advantage_A is None:
        return _Values(weight, None, contributes)
    advantage = of_all_rows(advantage_A)
    return _Values(weight, advantage, contributes & (advantage != 0).numpy())


def _micro_batch(
    index: LedgerIndex,
    rows: np.ndarray,
    tokens: Sequence[AnswerTokens],
    values: _Values,
    step: int,
    algorithm: Algorithm,
    denominator: float,
    layout: Layout,
    context_rank: int,
) -> MicroBatch:
    """Pack ``tokens``, of the ledger's ``rows``, and expand what is known of each answer to the loss tokens of this rank."""
    whole = pack(
        tokens,
        multiple=layout.multiple,
        sequence_multiple=layout.sequence_multiple,
        num_tokens=layout.token_budget if layout.pad_to_budget else None,
    )
    packed, kept_N = context_shard(whole, context_rank, layout.context_size)
    engine_logprobs = [answer.behaviour_logprobs for answer in tokens]
    answers = PackedAnswers(
        weight_R=(values.weight[rows] / denominator).float(),
        is_correct_R=torch.from_numpy(index.is_correct[rows]),
        correct_rate_R=torch.from_numpy(index.correct_rate[rows]).float(),
        length_R=torch.from_numpy(index.answer_length[rows]).long(),
        group_R=torch.from_numpy(np.unique(index.group_id[rows], return_inverse=True)[1]),
        advantage_R=None if values.advantage is None else values.advantage[rows].float(),
    )
    return MicroBatch(
        packed,
        weight_N=answers.weight_R[packed.answer_N],
        is_correct_N=answers.is_correct_R[packed.answer_N],
        correct_rate_N=answers.correct_rate_R[packed.answer_N],
        engine_logprob_N=torch.from_numpy(np.concatenate([np.empty(0, dtype=np.float32), *engine_logprobs]))[kept_N],
        is_stale_N=torch.from_numpy(index.weight_version[rows] < step - 1)[packed.answer_N],
        advantage_N=None if answers.advantage_R is None else answers.advantage_R[packed.answer_N],
        answers=answers if algorithm.coupling != "token" else None,
    )


def _to(device: torch.device, batch: MicroBatch) -> MicroBatch:
    """The same micro-batch with its tensors on ``device``."""
    movable = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor | PackedBatch | PackedAnswers)}
    moved: dict[str, Any] = {name: value.to(device) for name, value in movable.items()}
    return replace(batch, **moved)
