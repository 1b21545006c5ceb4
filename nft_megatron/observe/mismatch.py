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
    """Sums over tokens, to be added up over micro-batches and ranks: N, Σ|Δ|, Σ(e^Δ − 1 − Δ), Σe^Δ, Σe^2Δ; and max |Δ|.

    >>> sums = MismatchSums().add(torch.tensor([0.1, -0.3])).add(torch.tensor([0.2]))
    >>> sums.sums[0], round(sums.largest, 3)
    (3.0, 0.3)
    """

    sums: tuple[float, ...] = (0.0,) * 5
    largest: float = 0.0

    def add(self, delta_N: Tensor) -> MismatchSums:
        """These sums and those of ``delta_N``, log π − log μ of more tokens."""
        if not len(delta_N):
            return self
        delta_N = delta_N.double()
        ratio_N = delta_N.clamp(max=_LARGEST_EXPONENT).exp()
        kl_N = torch.expm1(delta_N.clamp(max=_LARGEST_EXPONENT)) - delta_N
        more = torch.stack([delta_N.abs().sum(), kl_N.sum(), ratio_N.sum(), ratio_N.square().sum()]).tolist()
        sums = tuple(a + b for a, b in zip(self.sums, [len(delta_N), *more], strict=True))
        return MismatchSums(sums, max(self.largest, float(delta_N.abs().max())))

    def metrics(self) -> MetricsRow:
        """The four numbers in nats (the last a share); of no tokens 0, 0, 0 and 1.

        >>> MismatchSums().add(torch.tensor([0.1, -0.1], dtype=torch.float64)).metrics()["mismatch_mean"]
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
