"""Negative-aware Fine-Tuning (NFT) and rejection-sampling fine-tuning (RFT).

Section 3.3 of arXiv 2505.18116, Eq. 10; ω and the sum over tokens are applied by the trainer:

    ℓ_t = − r·log R_t − (1 − r)·log max_v( (1 − r̂ R_t) / (1 − r̂), ε )        R_t = π_θ⁺(a_t | q, a_<t) / π(a_t | q, a_<t)
    max_v(x, ε) = stop_gradient[max(x, ε) − x] + x                            forward max(x, ε), backward the gradient of x

With Δ = log R_t and a = r̂ / (1 − r̂) the negative ratio is x = 1 − a·expm1(Δ), and

    right answers:  ℓ = −Δ                   dℓ/dlogp = −1
    wrong answers:  ℓ = −log max(x, ε)       dℓ/dlogp = a·e^Δ / max(x, ε)

These forms are exact in float32 where R itself is not: nothing is exponentiated just to take its logarithm again, and nothing
cancels near Δ = 0. RFT is Eq. 10 without its second term, with ω = 1 (section 5.1).

With ``ratio_type: sequence`` the ratio is that of the whole answer, as in Eq. 9, before the paper goes over to tokens:

    S = Σ_t log R_t        ℓ = − r·S − (1 − r)·log max_v( (1 − r̂ e^S) / (1 − r̂), ε )        one ℓ, with one ω, per answer

All tokens of an answer then have the same coefficient, that of the formulas above at Δ = S. |S| grows with the length, so
e^S is soon far from 1, and the coefficients of wrong answers far apart: the variance for which the paper prefers tokens
(section 3.3). ``train.denominator: sequences`` makes the loss a mean over answers.

Departures from the paper:
 1. In the wrong answers' formulas Δ (or S) is capped at ``LOG_RATIO_CAP`` = 10, and the gradient saturates there at
    a·e¹⁰ / max(x, ε). Taken literally, Eq. 10 overflows float32 from Δ = 88 on. Saturation keeps the direction and stays
    finite. ℓ itself changes only where r̂ < 4.6e-5, because otherwise x(10) < ε is clamped anyway.
 2. ``negative_weight`` multiplies ℓ of wrong answers. At 1, the default, this is Eq. 10; the authors' scripts suggest 0.5
    for 32B.

Where the authors' code differs from the paper, options follow it (docs/as_published.md has all of them); off by default:
 3. ``beyond_cap: zero``. The authors cap Δ in right and in wrong answers before R is formed, so that beyond 10 neither has a
    gradient: a wrong token that became e¹⁰ times as likely is never pushed down again, and a right one is pushed no further.
 4. ``rate_margin: 0.02`` clamps r̂ to [0.02, 0.98], in ℓ and in ω. The prompt filter keeps 0 < r̂ < 1, so that with K answers
    r̂ is within [1/K, 1 − 1/K], and the clamp has no effect up to K = 50.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from nft_megatron.algorithms.algorithm import (
    LOG_RATIO_CAP,
    Algorithm,
    AnswerBatch,
    Coupling,
    TokenBatch,
    TokenLoss,
    with_gradient,
)
from nft_megatron.algorithms.prompt_weights import PROMPT_WEIGHTS
from nft_megatron.base.config_model import PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor

BeyondCap = Literal["saturate", "zero"]


class NFT(Algorithm):
    """Negative-aware Fine-Tuning, Eq. 10 of arXiv 2505.18116."""

    name: Literal["nft"] = "nft"
    """Right answers directly, wrong answers through the implicit negative policy."""
    epsilon: PositiveFloat = 1.0
    """ε, the smallest implicit negative likelihood ratio (Figure 10: 1.0 is best, small values over-penalise)."""
    prompt_weight: Literal["one", "one_minus_rate", "sqrt_odds"] = "one_minus_rate"
    """ω(q): 1, 1 − r̂ (aligned with Dr. GRPO) or sqrt((1 − r̂) / r̂) (aligned with GRPO). Figure 9."""
    negative_weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the loss of wrong answers."""
    ratio_type: Literal["token", "sequence"] = "token"
    """R of each token, or of the whole answer (Eq. 9); with ``sequence`` set train.denominator=sequences."""
    beyond_cap: BeyondCap = "saturate"
    """Gradient beyond Δ = 10. ``saturate``: for wrong answers that at 10, for right ones −1 as always. ``zero``: none for
    either, as in the authors' code."""
    rate_margin: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """r̂ is clamped to [this, 1 − this]. The authors' code: 0.02, without effect up to 50 answers per question."""

    @property
    def coupling(self) -> Coupling:  # type: ignore[override]
        return self.ratio_type

    def weight(self, answers: AnswerBatch) -> Tensor:
        return PROMPT_WEIGHTS[self.prompt_weight](self._bounded(answers.correct_rate_A))

    def token_loss(self, batch: TokenBatch) -> TokenLoss:
        batch = batch._replace(correct_rate_N=self._bounded(batch.correct_rate_N))
        return nft_token_loss(batch, epsilon=self.epsilon, negative_weight=self.negative_weight, beyond_cap=self.beyond_cap)

    def sequence_loss(self, answers: AnswerBatch, log_ratio_A: Tensor) -> Tensor:
        whole = TokenBatch(log_ratio_A, log_ratio_A.new_zeros(()), answers.is_correct_A, answers.correct_rate_A)
        return self.token_loss(whole).loss_N

    def _bounded(self, correct_rate: Tensor) -> Tensor:
        return correct_rate.clamp(self.rate_margin, 1 - self.rate_margin) if self.rate_margin else correct_rate


class RFT(Algorithm):
    """Rejection-sampling fine-tuning: right answers only, ω = 1."""

    name: Literal["rft"] = "rft"
    """Wrong answers are not even forwarded."""
    uses_wrong_answers: ClassVar[bool] = False

    def token_loss(self, batch: TokenBatch) -> TokenLoss:
        return nft_token_loss(batch, negative_weight=0.0)


def nft_token_loss(
    batch: TokenBatch, *, epsilon: float = 1.0, negative_weight: float = 1.0, beyond_cap: BeyondCap = "saturate"
) -> TokenLoss:
    """ℓ of Eq. 10 with the gradient of :func:`nft_coefficient`. ``clamped_N``: wrong answers' tokens with x < ε."""
    delta_N = (batch.logprob_N - batch.old_logprob_N).detach()
    excess_N = negative_ratio_minus_one(delta_N, batch.correct_rate_N)
    # x ≤ 0 is possible and has no logarithm: bounded at 0 before it, at log ε after it. Bounding x itself at ε instead would
    # need the float32 number ε − 1, which is −1 for small ε.
    log_ratio_N = excess_N.clamp(min=-1).log1p().clamp(min=math.log(epsilon))
    right_N = -delta_N if beyond_cap == "saturate" else -delta_N.clamp(max=LOG_RATIO_CAP)
    value_N = right_N.where(batch.is_correct_N, -negative_weight * log_ratio_N)
    gradient_N = nft_coefficient(batch, epsilon=epsilon, negative_weight=negative_weight, beyond_cap=beyond_cap)
    clamped_N = ~batch.is_correct_N & (excess_N < epsilon - 1)
    return TokenLoss(with_gradient(value_N, gradient_N, batch.logprob_N), clamped_N)


def nft_coefficient(
    batch: TokenBatch, *, epsilon: float = 1.0, negative_weight: float = 1.0, beyond_cap: BeyondCap = "saturate"
) -> Tensor:
    """dℓ/dlogp of every token in closed form, shape N, not differentiable: −1, or a·e^Δ / max(x, ε) for wrong answers.

    This is Eq. 12's gradient weight times R (∇R = R·∇logp), and all that a backward pass needs from the loss.
    """
    delta_N = (batch.logprob_N - batch.old_logprob_N).detach()
    odds_N = batch.correct_rate_N / (1 - batch.correct_rate_N)
    ratio_N = (1 + negative_ratio_minus_one(delta_N, batch.correct_rate_N)).clamp(min=epsilon)
    wrong_N = negative_weight * odds_N * delta_N.clamp(max=LOG_RATIO_CAP).exp() / ratio_N
    coefficient_N = wrong_N.where(~batch.is_correct_N, -1.0)
    return coefficient_N if beyond_cap == "saturate" else coefficient_N.where(delta_N <= LOG_RATIO_CAP, 0.0)


def negative_ratio_minus_one(delta_N: Tensor, correct_rate_N: Tensor) -> Tensor:
    """x − 1 = −a·expm1(min(Δ, cap)), where x is the implicit negative likelihood ratio of Algorithm 1."""
    return -correct_rate_N / (1 - correct_rate_N) * delta_N.clamp(max=LOG_RATIO_CAP).expm1()
