"""From a step's ledger to one rank's packed mini-batches, with what the loss needs of every token.

Suffix ``_N``: one entry a loss token of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nft_megatron.algorithms import Algorithm
from nft_megatron.data.ledger import AnswerTokens, LedgerIndex, read_index, read_tokens
from nft_megatron.layout.context import context_shard
from nft_megatron.layout.minibatches import Answers, Layout, plan_minibatches
from nft_megatron.layout.packing import PackedBatch, Row, pack


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """A pack and what its loss needs of each token. ``weight_N`` is ω/D; ``is_stale_N`` marks answers of older weights.

    ``old_logprob_N`` is log π of the policy that answered: recomputed at the start of the step, or the engine's own where the
    answer is older than the weights. The trainer fills it, on the last pipeline stage only.
    """

    packed: PackedBatch
    weight_N: Tensor
    is_correct_N: Tensor
    correct_rate_N: Tensor
    engine_logprob_N: Tensor
    is_stale_N: Tensor
    old_logprob_N: Tensor | None = None


@dataclass(frozen=True)
class MiniBatch:
    """One optimizer step: this rank's micro-batches; ``num_tokens`` is of all ranks."""

    micro_batches: tuple[MicroBatch, ...]
    num_tokens: int


def read_minibatches(
    ledger: Path, step: int, algorithm: Algorithm, layout: Layout, data_rank: int, context_rank: int, device: torch.device
) -> list[MiniBatch]:
    """The mini-batches of ``step`` as one rank sees them. Only the tokens of its data-parallel rank's answers are read.

    Raises:
        UserError: the ledger is missing or damaged, or a sequence is longer than the layout's token budget.
    """
    index = read_index(ledger)
    rows = np.flatnonzero((index.fate == "train") & (index.label != "unknown") & (index.answer_length > 0))
    answers = Answers(
        group_id=index.group_id[rows],
        lengths=(index.prompt_length + index.answer_length)[rows],
        answer_lengths=index.answer_length[rows],
        is_forwarded=index.is_correct[rows] | algorithm.uses_wrong_answers,
    )
    plans = plan_minibatches(answers, step, layout)
    own = [[rows[members] for members in plan.rows_of[data_rank]] for plan in plans]
    needed = np.concatenate([rows[:0], *(members for minibatch in own for members in minibatch)])
    tokens = dict(zip(needed.tolist(), read_tokens(ledger, needed), strict=True))

    def micro_batch(members: np.ndarray, denominator: float) -> MicroBatch:
        own_tokens = [tokens[row] for row in members.tolist()]
        return _micro_batch(index, members, own_tokens, step, algorithm, denominator, layout, context_rank)

    return [
        MiniBatch(tuple(_to(device, micro_batch(members, plan.denominator)) for members in minibatch), plan.num_tokens)
        for minibatch, plan in zip(own, plans, strict=True)
    ]


def _micro_batch(
    index: LedgerIndex,
    rows: np.ndarray,
    answers: Sequence[AnswerTokens],
    step: int,
    algorithm: Algorithm,
    denominator: float,
    layout: Layout,
    context_rank: int,
) -> MicroBatch:
    """Pack ``answers``, the ledger's ``rows``, and expand what the ledger says of each to the loss tokens of this rank."""
    whole = pack(
        [Row(answer.prompt_tokens, answer.answer_tokens) for answer in answers],
        multiple=layout.multiple,
        sequence_multiple=layout.sequence_multiple,
        num_tokens=layout.token_budget if layout.pad_to_budget else None,
    )
    packed, kept_N = context_shard(whole, context_rank, layout.context_size)
    engine_logprobs = [answer.behaviour_logprobs for answer in answers]
    correct_rate_N = torch.from_numpy(index.correct_rate[rows])[packed.row_N]
    return MicroBatch(
        packed,
        weight_N=(algorithm.prompt_weight(correct_rate_N) / denominator).float(),
        is_correct_N=torch.from_numpy(index.is_correct[rows])[packed.row_N],
        correct_rate_N=correct_rate_N.float(),
        engine_logprob_N=torch.from_numpy(np.concatenate([np.empty(0, dtype=np.float32), *engine_logprobs]))[kept_N],
        is_stale_N=torch.from_numpy(index.weight_version[rows] < step - 1)[packed.row_N],
    )


def _to(device: torch.device, batch: MicroBatch) -> MicroBatch:
    """The same micro-batch with its tensors on ``device``."""
    movable = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor | PackedBatch)}
    moved: dict[str, Any] = {name: value.to(device) for name, value in movable.items()}
    return replace(batch, **moved)
