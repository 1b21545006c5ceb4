"""CISPO, clipped importance-sampling policy optimization: REINFORCE whose importance weights are clipped, not its gradients.

Eq. 4 and 5 of arXiv 2506.13585 (MiniMax-M1); the sum over tokens and its denominator are the trainer's:

    ℓ_t = − stop_gradient[ min(R_t, R_max) ]·A·log π_θ(a_t | q, a_<t)        A = (r − mean) / std over the K answers
    dℓ/dlogp = − min(R_t, R_max)·A

Where GRPO gives a token beyond the clip no gradient, CISPO bounds its weight: rare tokens, whose ratios are far from 1 after
one update, keep pushing. Like DAPO, from which the paper takes dynamic sampling, it trains on mixed questions alone.

Departures from the paper:
 1. The paper clips at 1 + ε_high without giving ε_high, and puts no bound below. ``max_ratio`` is 1 + ε_high; 5 is the value
    of arXiv 2510.13786, which tuned it.
 2. ℓ_t is written with log R_t for log π_θ. The two differ by a constant and have the same gradient, and at R = 1 it is 0.
 3. std is the population standard deviation, as for GRPO here (policy_gradient.py). DAPO's length penalty is left out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from nft_megatron.algorithms.algorithm import Algorithm, AnswerBatch, TokenBatch, TokenLoss, with_gradient
from nft_megatron.algorithms.policy_gradient import group_advantage

if TYPE_CHECKING:
    from torch import Tensor


class CISPO(Algorithm):
    """REINFORCE with clipped importance weights (arXiv 2506.13585)."""

    name: Literal["cispo"] = "cispo"
    """Policy gradient in which every token keeps a gradient, its importance weight bounded."""
    max_ratio: Annotated[float, Field(ge=1, le=1e4)] = 5.0
    """R_max: the largest importance weight of a token."""

    def advantage(self, answers: AnswerBatch) -> Tensor:
        return group_advantage(answers.is_correct_A.to(answers.correct_rate_A), answers.group_A, normalise=True)

    def token_loss(self, batch: TokenBatch) -> TokenLoss:
        return cispo_token_loss(batch, max_ratio=self.max_ratio)


def cispo_token_loss(batch: TokenBatch, *, max_ratio: float = 5.0) -> TokenLoss:
    """ℓ with the gradient −min(R_t, R_max)·A. ``clamped_N``: tokens whose importance weight is bounded.

    >>> import torch
    >>> delta_N, advantage_N = torch.tensor([0.0, 3.0], requires_grad=True), torch.tensor([1.0, -1.0])
    >>> batch = TokenBatch(delta_N, torch.zeros(2), advantage_N > 0, torch.full((2,), 0.5), advantage_N)
    >>> cispo_token_loss(batch).loss_N.sum().backward()
    >>> delta_N.grad.tolist()
    [-1.0, 5.0]
    """
    assert batch.advantage_N is not None
    delta_N = (batch.logprob_N - batch.old_logprob_N).detach()
    weight_N = delta_N.clamp(max=math.log(max_ratio)).exp()
    gradient_N = -weight_N * batch.advantage_N
    return TokenLoss(with_gradient(gradient_N * delta_N, gradient_N, batch.logprob_N), delta_N > math.log(max_ratio))
