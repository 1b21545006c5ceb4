"""GRPO, Dr. GRPO and DAPO: clipped policy gradients with group-relative advantages.

Eq. 3 of arXiv 2505.18116; the sum over tokens and its denominator are the trainer's:

    ℓ_t = − min[ R_t·A, clip(R_t, 1 − ε₋, 1 + ε₊)·A ]        R_t = π_θ(a_t | q, a_<t) / π(a_t | q, a_<t)

    GRPO       A = (r − mean) / std over the K answers of the question          arXiv 2402.03300
    Dr. GRPO   A = r − mean                                                     arXiv 2503.20783
    DAPO       A = (s − mean) / std,  s = (2r − 1) + overlong penalty           arXiv 2503.14476, Eq. 8, 9 and 13

std is the population standard deviation: with it A = sqrt((1 − r̂)/r̂) for right and −sqrt(r̂/(1 − r̂)) for wrong answers
(Proposition 4.1), and 0 where all answers agree. For A > 0 the gradient dℓ/dlogp = −A·R_t vanishes where R_t ≥ 1 + ε₊, for
A < 0 where R_t ≤ 1 − ε₋. DAPO's four parts: clip-higher is ε₊ = 0.28 > ε₋ = 0.2; the token-level loss is
``train.denominator: tokens``; dynamic sampling is ``needs_mixed_groups``; the soft overlong punishment, in a buffer of
B tokens before the length limit L, is

    penalty = − c · min(1, max(0, |a| − (L − B)) / B),   − c for every truncated answer

Departures from the published algorithms:
 1. GRPO and Dr. GRPO are the variants compared in the paper (appendix B.2.4): with DAPO's clip-higher and token-level loss,
    without a KL term. GRPO as first published is ``clip_high: 0.2``, ``per_answer_mean: true`` and
    ``train.denominator: sequences``.
 2. For A < 0, Δ = log R_t is capped at ``LOG_RATIO_CAP`` = 10, where the gradient saturates: nothing overflows and the
    direction stays. Published code bounds it by a second clip with zero gradient.
 3. The buffer B is a share of L, by default DAPO's 4096 of 20480 tokens, so that it fits any limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from nft_megatron.algorithms.algorithm import (
    LOG_RATIO_CAP,
    Algorithm,
    AnswerBatch,
    TokenBatch,
    TokenLoss,
    group_mean,
    with_gradient,
)

if TYPE_CHECKING:
    from torch import Tensor

Clip = Annotated[float, Field(gt=0)]


class _Clipped(Algorithm):
    """Options and formulas that the three share."""

    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """ε₋: a wrong answer's token is not pushed down once R_t ≤ 1 − ε₋."""
    clip_high: Clip = 0.28
    """ε₊: a right answer's token is not pushed up once R_t ≥ 1 + ε₊."""

    def token_loss(self, batch: TokenBatch) -> TokenLoss:
        return clipped_token_loss(batch, clip_low=self.clip_low, clip_high=self.clip_high)


class GRPO(_Clipped):
    """Group relative policy optimization, Eq. 3 of arXiv 2505.18116."""

    name: Literal["grpo"] = "grpo"
    """Clipped policy gradient; advantages have mean 0 and standard deviation 1 over a question's answers."""
    per_answer_mean: bool = False
    """Divide the loss of every token by its answer's length, as GRPO was first published (set train.denominator=sequences)."""
    needs_mixed_groups: ClassVar[bool] = False

    def weight(self, answers: AnswerBatch) -> Tensor:
        return 1 / answers.length_A.to(answers.correct_rate_A).clamp(min=1) if self.per_answer_mean else super().weight(answers)

    def advantage(self, answers: AnswerBatch) -> Tensor:
        return group_advantage(answers.is_correct_A.to(answers.correct_rate_A), answers.group_A, normalise=True)


class DrGRPO(_Clipped):
    """GRPO without the standard deviation in the advantage (arXiv 2503.20783)."""

    name: Literal["dr_grpo"] = "dr_grpo"
    """Clipped policy gradient with advantage r − r̂."""
    needs_mixed_groups: ClassVar[bool] = False

    def advantage(self, answers: AnswerBatch) -> Tensor:
        return group_advantage(answers.is_correct_A.to(answers.correct_rate_A), answers.group_A, normalise=False)


class DAPO(_Clipped):
    """GRPO with clip-higher, token-level loss, dynamic sampling and soft overlong punishment (arXiv 2503.14476)."""

    name: Literal["dapo"] = "dapo"
    """Clipped policy gradient on mixed questions, with a penalty on long answers."""
    overlong_buffer: Annotated[float, Field(gt=0, le=1)] = 0.2
    """B: last share of rollout.max_answer_tokens, in which an answer's reward falls with its length."""
    overlong_penalty: Annotated[float, Field(ge=0)] = 1.0
    """c: penalty of an answer of rollout.max_answer_tokens, or of a truncated one; 0: none."""

    def advantage(self, answers: AnswerBatch) -> Tensor:
        reward_A = 2 * answers.is_correct_A.to(answers.correct_rate_A) - 1
        shaping_A = overlong_penalty(answers, buffer=self.overlong_buffer, penalty=self.overlong_penalty)
        return group_advantage(reward_A + shaping_A, answers.group_A, normalise=True)


def group_advantage(reward_A: Tensor, group_A: Tensor, *, normalise: bool) -> Tensor:
    """r − mean, divided by the population standard deviation if ``normalise``; 0 where all rewards of a group are equal.

    >>> import torch
    >>> reward_A, group_A = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 0, 0, 1])
    >>> group_advantage(reward_A, group_A, normalise=True)
    tensor([ 2.0000, -0.5000, -0.5000, -0.5000, -0.5000,  0.0000])
    """
    centred_A = reward_A - group_mean(reward_A, group_A)
    if not normalise:
        return centred_A
    variance_A = group_mean(centred_A.square(), group_A)
    return (centred_A / variance_A.sqrt()).where(variance_A > 1e-12, 0.0)


def overlong_penalty(answers: AnswerBatch, *, buffer: float, penalty: float) -> Tensor:
    """DAPO's soft overlong punishment, Eq. 13, shape A, ≤ 0.

    >>> import torch
    >>> lengths = torch.tensor([7, 9, 10, 3])
    >>> answers = AnswerBatch(
    ...     lengths, lengths > 0, torch.zeros(4), lengths, torch.tensor([False, False, False, True]), length_limit=10
    ... )
    >>> overlong_penalty(answers, buffer=0.2, penalty=1.0).tolist()
    [-0.0, -0.5, -1.0, -1.0]
    """
    num_buffer = buffer * answers.length_limit
    beyond_A = answers.length_A.to(answers.correct_rate_A) - (answers.length_limit - num_buffer)
    share_A = (beyond_A / num_buffer).clamp(min=0, max=1)
    return -penalty * share_A.where(~answers.is_truncated_A, 1.0)


def clipped_token_loss(batch: TokenBatch, *, clip_low: float = 0.2, clip_high: float = 0.28) -> TokenLoss:
    """ℓ of Eq. 3 with the gradient of :func:`clipped_coefficient`. ``clamped_N``: tokens without a gradient."""
    assert batch.advantage_N is not None
    ratio_N, clipped_N = _ratio_and_clipped(batch, clip_low, clip_high)
    bounded_N = ratio_N.clamp(max=1 + clip_high).where(batch.advantage_N > 0, ratio_N.clamp(min=1 - clip_low))
    gradient_N = clipped_coefficient(batch, clip_low=clip_low, clip_high=clip_high)
    return TokenLoss(with_gradient(-bounded_N * batch.advantage_N, gradient_N, batch.logprob_N), clipped_N)


def clipped_coefficient(batch: TokenBatch, *, clip_low: float = 0.2, clip_high: float = 0.28) -> Tensor:
    """dℓ/dlogp of every token in closed form, shape N, not differentiable: −A·R_t, or 0 beyond the clip.

    This is Eq. 11's gradient weight times R.
    """
    assert batch.advantage_N is not None
    ratio_N, clipped_N = _ratio_and_clipped(batch, clip_low, clip_high)
    return (-batch.advantage_N * ratio_N).where(~clipped_N, 0.0)


def _ratio_and_clipped(batch: TokenBatch, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """R_t, and whether it is beyond the clip in the direction of the advantage."""
    assert batch.advantage_N is not None
    ratio_N = (batch.logprob_N - batch.old_logprob_N).detach().clamp(max=LOG_RATIO_CAP).exp()
    above_N, below_N = ratio_N >= 1 + clip_high, ratio_N <= 1 - clip_low
    return ratio_N, above_N & (batch.advantage_N > 0) | below_N & (batch.advantage_N < 0)
