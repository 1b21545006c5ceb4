"""How far the engine that generated the answers is from the trainer that learns from them.

Both hold the same weights but use different kernels, batches and perhaps dtypes, so the trainer's policy π differs slightly
from the engine's μ, from which the answers were drawn. With Δ = log π − log μ of each token:

    mean |Δ|, max |Δ|
    KL(μ ‖ π) ≈ mean(e^Δ − 1 − Δ)                  unbiased, each term ≥ 0
    effective sample size (Σ e^Δ)² / (N · Σ e^2Δ)   of importance weights π/μ, as a share of the N tokens

Suffix ``_N``: one entry a loss token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nft_megatron.observe.metrics import MetricsRow

_LARGEST_EXPONENT = 20.0
"""Beyond it a ratio says only that the policies have nothing in common; keeps the sums finite."""


@dataclass(frozen=True)
class MismatchSums:
    """Over all tokens: N, Σ|Δ|, Σ(e^Δ − 1 − Δ), Σe^Δ, Σe^2Δ; and max |Δ|."""

    sums: tuple[float, ...] = (0.0,) * 5
    largest: float = 0.0

    def __add__(self, other: MismatchSums) -> MismatchSums:
        sums = tuple(a + b for a, b in zip(self.sums, other.sums, strict=True))
        return MismatchSums(sums, max(self.largest, other.largest))

    def metrics(self) -> MetricsRow:
        """The four numbers in nats (the last a share); of no tokens 0, 0, 0 and 1.

        >>> largest, *sums = mismatch_sums(torch.tensor([0.1, -0.1], dtype=torch.float64), torch.tensor([True, True])).tolist()
        >>> MismatchSums(tuple(sums), largest).metrics()["mismatch_mean"]
        0.1
        >>> MismatchSums().metrics()["mismatch_ess"]
        1.0
        """
        num, gap, kl, ratio, squares = self.sums
        return {
            "mismatch_mean": gap / max(num, 1.0),
            "mismatch_max": self.largest,
            "mismatch_kl": kl / max(num, 1.0),
            "mismatch_ess": ratio * ratio / (num * squares) if num else 1.0,
        }


def mismatch_sums(delta_N: Tensor, counts_N: Tensor) -> Tensor:
    """Max |Δ| and then the sums of :class:`MismatchSums`, of the tokens where ``counts_N`` (bool); float64 [6].

    To be added up over micro-batches and ranks, but of the first the largest. ``delta_N``: log π − log μ.

    >>> mismatch_sums(torch.tensor([0.25, -0.5, 9.0]), torch.tensor([True, True, False]))[:3]
    tensor([0.5000, 2.0000, 0.7500], dtype=torch.float64)
    """
    delta_N = delta_N.double().where(counts_N, 0.0)
    if not len(delta_N):
        return delta_N.new_zeros(6)
    capped_N = delta_N.clamp(max=_LARGEST_EXPONENT)
    ratio_N = capped_N.exp().where(counts_N, 0.0)
    kl_N = torch.expm1(capped_N) - delta_N
    gap_N = delta_N.abs()
    num = counts_N.double().sum()
    return torch.stack([gap_N.max(), num, gap_N.sum(), kl_N.sum(), ratio_N.sum(), ratio_N.square().sum()])
