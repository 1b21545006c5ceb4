"""ω(q), the weight of a question's tokens in the loss, as a function of its correctness rate r̂ (section 5.4, Figure 9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def one(correct_rate: Tensor) -> Tensor:
    """ω = 1."""
    return correct_rate.new_ones(correct_rate.shape)


def one_minus_rate(correct_rate: Tensor) -> Tensor:
    """ω = 1 − r̂. On-policy NFT then has Dr. GRPO's gradient (Remark A.3)."""
    return 1 - correct_rate


def sqrt_odds(correct_rate: Tensor) -> Tensor:
    """ω = sqrt((1 − r̂) / r̂). On-policy NFT then has GRPO's gradient (Proposition 4.2). Needs r̂ > 0.

    >>> import torch
    >>> sqrt_odds(torch.tensor([0.2, 0.5]))
    tensor([2., 1.])
    """
    return ((1 - correct_rate) / correct_rate).sqrt()


PROMPT_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one": one,
    "one_minus_rate": one_minus_rate,
    "sqrt_odds": sqrt_odds,
}
