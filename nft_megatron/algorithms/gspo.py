"""GSPO, group sequence policy optimization: GRPO with the likelihood ratio of whole answers.

Eq. 5 to 7 of arXiv 2507.18071, with S = Σ_t log R_t over the |a| tokens of an answer:

    s = exp(S / |a|)        the geometric mean of R_t = π_θ(a_t | q, a_<t) / π(a_t | q, a_<t)
    ℓ = − min[ s·A, clip(s, 1 − ε₋, 1 + ε₊)·A ]        A = (r − mean) / std over the K answers of the question

    dℓ/dlogp = − A·s / |a| for every token of the answer; 0 where A > 0 and s ≥ 1 + ε₊, or A < 0 and s ≤ 1 − ε₋

So either all tokens of an answer are pushed or none. s stays within a few 1e-3 of 1 where R of single tokens does not, hence
the narrow clip. The paper's loss is the mean over answers: set ``train.denominator: sequences``.

Departures from the paper:
 1. std is the population standard deviation, as for GRPO here (policy_gradient.py).
 2. For A < 0, S / |a| is capped at ``LOG_RATIO_CAP`` = 10, where the gradient saturates: nothing overflows.
 3. GSPO-token, the variant with an advantage for every token, is left out: with one advantage per answer it is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from nft_megatron.algorithms.algorithm import LOG_RATIO_CAP, Algorithm, AnswerBatch, Coupling, with_gradient
from nft_megatron.algorithms.policy_gradient import Clip, group_advantage

if TYPE_CHECKING:
    from torch import Tensor


class GSPO(Algorithm):
    """Group sequence policy optimization (arXiv 2507.18071)."""

    name: Literal["gspo"] = "gspo"
    """Clipped policy gradient on the length-normalised ratio of whole answers; set train.denominator=sequences."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 3e-4
    """ε₋: a wrong answer is not pushed down once s ≤ 1 − ε₋. The paper's value."""
    clip_high: Clip = 4e-4
    """ε₊: a right answer is not pushed up once s ≥ 1 + ε₊. The paper's value."""
    coupling: ClassVar[Coupling] = "sequence"
    needs_mixed_groups: ClassVar[bool] = False

    def advantage(self, answers: AnswerBatch) -> Tensor:
        return group_advantage(answers.is_correct_A.to(answers.correct_rate_A), answers.group_A, normalise=True)

    def sequence_loss(self, answers: AnswerBatch, log_ratio_A: Tensor) -> Tensor:
        return gspo_loss(answers, log_ratio_A, clip_low=self.clip_low, clip_high=self.clip_high)


def gspo_loss(answers: AnswerBatch, log_ratio_A: Tensor, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> Tensor:
    """ℓ of every answer, shape A, with its gradient in closed form.

    >>> import torch
    >>> length_A, advantage_A = torch.tensor([4, 4]), torch.tensor([2.0, -0.5])
    >>> answers = AnswerBatch(length_A, advantage_A > 0, advantage_A, length_A, length_A < 0, 9, advantage_A=advantage_A)
    >>> log_ratio_A = torch.tensor([0.4, 0.4], requires_grad=True)
    >>> loss_A = gspo_loss(answers, log_ratio_A, clip_low=0.1, clip_high=0.1)
    >>> loss_A.sum().backward()
    >>> loss_A.tolist(), log_ratio_A.grad.tolist()  # −2·1.1, clipped; 0.5·e^0.1, and a quarter of that
    ([-2.200000047683716, 0.5525854825973511], [0.0, 0.13814637064933777])
    """
    advantage_A = answers.advantage_A
    assert advantage_A is not None
    length_A = answers.length_A.to(log_ratio_A).clamp(min=1)
    ratio_A = (log_ratio_A.detach() / length_A).clamp(max=LOG_RATIO_CAP).exp()
    bounded_A = ratio_A.clamp(max=1 + clip_high).where(advantage_A > 0, ratio_A.clamp(min=1 - clip_low))
    is_clipped_A = (ratio_A >= 1 + clip_high) & (advantage_A > 0) | (ratio_A <= 1 - clip_low) & (advantage_A < 0)
    gradient_A = (-advantage_A * ratio_A / length_A).where(~is_clipped_A, 0.0)
    return with_gradient(-bounded_A * advantage_A, gradient_A, log_ratio_A)
