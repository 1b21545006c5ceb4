"""What a rollout step generates and trains on, from the configuration and two assumptions that it cannot contain."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from nft_megatron.base.errors import UserError
from nft_megatron.batching.minibatches import BatchingRules
from nft_megatron.batching.packing import plan_micro_batches
from nft_megatron.config.schema import Config
from nft_megatron.plan.layouts import ParallelLayout
from nft_megatron.weights import ModelShape


@dataclass(frozen=True)
class Assumptions:
    """What only a run can show.

    answer_tokens: mean length of an answer; by default a quarter of the limit. mixed_share: share of questions with both right
    and wrong answers. With the prompt filter a step needs more questions to find them; without it a step forwards fewer
    answers.

    >>> Assumptions(answer_tokens=900).mixed_share
    0.5
    """

    answer_tokens: int | None = None
    mixed_share: float = 0.5

    def __post_init__(self) -> None:
        if self.answer_tokens is not None and self.answer_tokens < 1:
            raise UserError("--answer-tokens", self.answer_tokens, "must be above 0", "use a whole number, such as 1000")
        if not 0 < self.mixed_share <= 1:
            raise UserError("--mixed-share", self.mixed_share, "must be in (0, 1]", "use a number such as 0.5")


@dataclass(frozen=True)
class Workload:
    """One rollout step.

    answer_lengths: of the answers that one update forwards. prompt_tokens: of every prompt. num_asked: answers generated,
    to ``num_questions`` questions.
    """

    num_updates: int
    num_questions: int
    group_size: int
    prompt_tokens: int
    answer_lengths: tuple[int, ...]
    longest_sequence: int

    @property
    def num_asked(self) -> int:
        return self.num_questions * self.group_size

    @property
    def mean_answer(self) -> float:
        return float(np.mean(self.answer_lengths))


@dataclass(frozen=True)
class Packs:
    """One update on the data-parallel rank with the most work: sums over its ``num_micro_batches`` packs.

    tokens: including padding. pairs: of a token and a token that it sees. positions: answer tokens, which carry a loss.
    """

    num_micro_batches: int
    tokens: int
    pairs: int
    positions: int


def workload_of(config: Config, assumptions: Assumptions) -> Workload:
    """The step of ``config``. Assumes prompts at a quarter of their limit, answers spread exponentially up to theirs."""
    rollout, limit = config.rollout, config.rollout.max_answer_tokens
    mean = min(assumptions.answer_tokens or math.ceil(limit / 4), limit)
    num_questions = rollout.questions_per_step
    num_answers = num_questions // config.train.updates_per_step * rollout.group_size
    if config.filters_prompts:
        num_questions = math.ceil(num_questions / assumptions.mixed_share)
    else:
        num_answers = math.ceil(num_answers * assumptions.mixed_share)  # advantages are 0 where all answers agree
    return Workload(
        num_updates=config.train.updates_per_step,
        num_questions=num_questions,
        group_size=rollout.group_size,
        prompt_tokens=math.ceil(config.data.max_prompt_tokens / 4),
        answer_lengths=tuple(spread(num_answers, mean, limit)),
        longest_sequence=config.max_sequence_tokens,
    )


def spread(count: int, mean: float, limit: int) -> list[int]:
    """``count`` lengths between 1 and ``limit`` with about this mean: the midpoints of equally likely parts of an exponential
    distribution that is truncated at ``limit``.

    >>> spread(4, 100, 1000)
    [13, 47, 98, 208]
    >>> spread(2, 1000, 1000)
    [1000, 1000]
    """
    if mean >= limit:
        return [limit] * count
    low, high = 0.0, 1e6 * limit
    for _ in range(100):  # solve scale · (1 − e^(−limit / scale)), the mean after truncation, for the scale
        scale = (low + high) / 2
        low, high = (scale, high) if scale * -math.expm1(-limit / scale) < mean else (low, scale)
    return [max(1, min(limit, round(-scale * math.log1p(-(part + 0.5) / count)))) for part in range(count)]


def batching_rules(config: Config, layout: ParallelLayout, hidden_size: int) -> BatchingRules:
    """How the trainer splits mini-batches into packs under ``layout``.

    Raises:
        UserError: if packs cannot have ``train.micro_batch_tokens``.
    """
    return BatchingRules.of(
        config,
        hidden_size,
        data=layout.data,
        tensor=layout.tensor,
        context=layout.context,
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        token_budget=layout.micro_batch_tokens,
    )


def pack_update(config: Config, shape: ModelShape, layout: ParallelLayout, work: Workload) -> Packs:
    """Pack an update's answers as the trainer does.

    Raises:
        UserError: if the longest sequence does not fit into a pack.
    """
    rules = batching_rules(config, layout, shape.hidden_size)
    answers = work.answer_lengths
    if not config.algorithm.uses_wrong_answers:
        answers = answers[::2]  # right and wrong in equal numbers
    return _pack(rules, answers, work.prompt_tokens, work.longest_sequence)


@functools.lru_cache(maxsize=512)
def _pack(rules: BatchingRules, answers: tuple[int, ...], prompt: int, longest: int) -> Packs:
    lengths = np.array(answers) + prompt

    def packed(lengths: np.ndarray) -> list[list[np.ndarray]]:
        return plan_micro_batches(
            lengths,
            token_budget=rules.token_budget,
            num_ranks=rules.num_ranks,
            multiple=rules.multiple,
            sequence_multiple=rules.sequence_multiple,
            count_multiple=rules.count_multiple,
            hidden_size=rules.hidden_size,
        )

    packed(np.array([longest]))  # the longest possible sequence, which is not among the lengths
    ranks = []
    for packs in packed(lengths):
        padded = [-(-lengths[members] // rules.sequence_multiple) * rules.sequence_multiple for members in packs]
        tokens = [-(-max(int(pack.sum()), 1) // rules.multiple) * rules.multiple for pack in padded]
        ranks.append(
            Packs(
                num_micro_batches=len(packs),
                tokens=len(packs) * rules.token_budget if rules.pad_to_budget else sum(tokens),
                pairs=sum(int((pack * (pack + 1) // 2).sum()) for pack in padded),
                positions=sum(int((lengths[members] - prompt).sum()) for members in packs),
            )
        )
    return max(ranks, key=lambda rank: rank.pairs / (6 * rules.hidden_size) + rank.tokens)
