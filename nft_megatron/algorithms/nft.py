"""Negative-aware Fine-Tuning (NFT) and rejection-sampling fine-tuning (RFT).

Section 3.3 of arXiv 2505.18116, Eq. 10; ω and the sum over tokens are applied by the trainer:

    ℓ_t = − r·log R_t − (1 − r)·log max_v( (1 − r̂ R_t) / (1 − r̂), ε )        R_t = π_θ⁺(a_t | q, a_<t) / π(a_t | q, a_<t)
    max_v(x, ε) = stop_gradient[max(x, ε) − x] + x                            forward max(x, ε), backward the gradient of x

With Δ = log R_t and a = r̂ / (1 − r̂) the negative ratio is x = 1 − a·expm1(Δ), and

    right answers:  ℓ = −Δ                   dℓ/dlogp = −1
    wrong answers:  ℓ = −log max(x, ε)       dℓ/dlogp = a·e^Δ / max(x, ε)

These forms are exact in float32 where R itself is not: nothing is exponentiated only to take its logarithm again, and near
Δ = 0 nothing cancels. RFT is Eq. 10 without its second term, with ω = 1 (section 5.1).

Departures from the published algorithm:
 1. In the wrong answers' formulas Δ is capped at ``LOG_RATIO_CAP`` = 10, and the gradient saturates there at
    a·e¹⁰ / max(x, ε). Eq. 10 as it stands overflows float32 from Δ = 88 on; the authors' code caps Δ too, but by an operation
    whose gradient is zero, so a wrong token that became e¹⁰ times as likely is never pushed down again. Saturation keeps the
    direction and stays finite. ℓ itself is changed only where r̂ < 4.6e-5, because else x(10) < ε is clamped in any case.
 2. r̂ is not clamped to [0.02, 0.98], as in the authors' code. The prompt filter keeps 0 < r̂ < 1, so that with K answers r̂
    is within [1/K, 1 − 1/K], and the clamp would be without effect up to K = 50.
 3. ``negative_weight`` multiplies ℓ of wrong answers. At 1, the default, this is Eq. 10; the authors' scripts suggest 0.5
    for 32B.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from nft_megatron.algorithms.algorithm import Algorithm, TokenBatch, TokenLoss, lookup, with_gradient
from nft_megatron.algorithms.prompt_weights import PROMPT_WEIGHTS, one
from nft_megatron.errors import UserError

LOG_RATIO_CAP = 10.0
"""Departure 1: the largest Δ = log R_t in the formulas of wrong answers."""


def build_nft(*, epsilon: float = 1.0, prompt_weight: str = "one_minus_rate", negative_weight: float = 1.0) -> Algorithm:
    """NFT. ``epsilon`` is ε; ``prompt_weight`` names ω; ``negative_weight`` scales the loss of wrong answers.

    Raises:
        UserError: ε ≤ 0, negative_weight < 0, or an unknown ω.
    """
    if not epsilon > 0:
        raise UserError("algorithm.epsilon", epsilon, "log max(x, ε) needs ε > 0", "the paper uses 1.0")
    if not 0 <= negative_weight < math.inf:
        raise UserError("algorithm.negative_weight", negative_weight, "must be finite and ≥ 0", "the paper uses 1.0")
    return Algorithm(
        name="nft",
        uses_wrong_answers=True,
        prompt_weight=lookup("algorithm.prompt_weight", prompt_weight, PROMPT_WEIGHTS),
        token_loss=functools.partial(nft_token_loss, epsilon=epsilon, negative_weight=negative_weight),
    )


def build_rft() -> Algorithm:
    """RFT: NFT on right answers alone, ω = 1."""
    return Algorithm(
        name="rft",
        uses_wrong_answers=False,
        prompt_weight=one,
        token_loss=rft_token_loss,
    )


def nft_token_loss(batch: TokenBatch, *, epsilon: float = 1.0, negative_weight: float = 1.0) -> TokenLoss:
    """ℓ of Eq. 10 with the gradient of :func:`nft_coefficient`. ``clamped_N``: wrong answers' tokens with x < ε."""
    delta_N = (batch.logprob_N - batch.old_logprob_N).detach()
    excess_N = _negative_ratio_minus_one(delta_N, batch.correct_rate_N)
    # x ≤ 0 is possible and has no logarithm: bounded at 0 before, and at log ε after. Bounding x itself at ε instead would
    # need the float32 number ε − 1, which is −1 for small ε.
    log_ratio_N = torch.log1p(excess_N.clamp(min=-1)).clamp(min=math.log(epsilon))
    value_N = torch.where(batch.is_correct_N, -delta_N, -negative_weight * log_ratio_N)
    gradient_N = nft_coefficient(batch, epsilon=epsilon, negative_weight=negative_weight)
    clamped_N = ~batch.is_correct_N & (excess_N < epsilon - 1)
    return TokenLoss(with_gradient(value_N, gradient_N, batch.logprob_N), clamped_N)


def nft_coefficient(batch: TokenBatch, *, epsilon: float = 1.0, negative_weight: float = 1.0) -> Tensor:
    """dℓ/dlogp of every token in closed form, shape N, not differentiable: −1, or a·e^Δ / max(x, ε) for wrong answers.

    This is Eq. 12's gradient weight times R (∇R = R·∇logp), and all that a backward pass needs to know of the loss.
    """
    delta_N = (batch.logprob_N - batch.old_logprob_N).detach()
    odds_N = batch.correct_rate_N / (1 - batch.correct_rate_N)
    ratio_N = (1 + _negative_ratio_minus_one(delta_N, batch.correct_rate_N)).clamp(min=epsilon)
    wrong_N = negative_weight * odds_N * delta_N.clamp(max=LOG_RATIO_CAP).exp() / ratio_N
    return torch.where(batch.is_correct_N, -torch.ones_like(wrong_N), wrong_N)


def rft_token_loss(batch: TokenBatch) -> TokenLoss:
    """ℓ = −Δ on right answers; 0 on wrong ones, which the trainer doesn't even forward."""
    return nft_token_loss(batch, negative_weight=0.0)


def _negative_ratio_minus_one(delta_N: Tensor, correct_rate_N: Tensor) -> Tensor:
    """x − 1 = −a·expm1(min(Δ, cap)), where x is the implicit negative likelihood ratio of Algorithm 1."""
    return -correct_rate_N / (1 - correct_rate_N) * torch.expm1(delta_N.clamp(max=LOG_RATIO_CAP))
