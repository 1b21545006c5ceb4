"""NFT's instruments by the correctness rate r̂ of the question: where negatives are clamped, where the gradient comes from.

Of the trained tokens of an update, in five buckets of r̂:

    clamped share           wrong answers' tokens whose ratio the algorithm bounded (NFT: x < ε)
    mean negative ratio     x = (1 − r̂ R_t) / (1 − r̂) over wrong answers' tokens; 1 before the first update of a step
    gradient share          Σ_t |∂loss/∂log π_θ(a_t)| of the bucket as a part of that of all buckets

Suffix ``_N``: one entry a loss token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nft_megatron.algorithms.nft import negative_ratio_minus_one
from nft_megatron.observe.metrics import RATE_BUCKETS, MetricsRow


@dataclass(frozen=True)
class RateBuckets:
    """The sums of :func:`bucket_sums` over all micro-batches and ranks of an update; updates are added up.

    >>> (RateBuckets((1.0,) * 20) + RateBuckets((0.5,) * 20)).sums[0]
    1.5
    """

    sums: tuple[float, ...] = (0.0,) * (4 * len(RATE_BUCKETS))

    def __add__(self, other: RateBuckets) -> RateBuckets:
        return RateBuckets(tuple(a + b for a, b in zip(self.sums, other.sums, strict=True)))

    def metrics(self) -> MetricsRow:
        """What the sums say; nothing for a bucket without wrong answers, or without any token.

        >>> ones_N, is_correct_N = torch.ones(3), torch.tensor([True, False, False])
        >>> sums = bucket_sums(0 * ones_N, is_correct_N, ones_N / 2, ones_N > 0, ones_N)
        >>> RateBuckets(tuple(sums.tolist())).metrics()
        {'clamp_rate/0.4-0.6': 1.0, 'negative_ratio/0.4-0.6': 1.0, 'gradient_share/0.4-0.6': 1.0}
        """
        size = len(RATE_BUCKETS)
        num_wrong, num_clamped, ratio, gradient = (self.sums[start : start + size] for start in range(0, 4 * size, size))
        row: MetricsRow = {}
        for bucket, name in enumerate(RATE_BUCKETS):
            if num_wrong[bucket]:
                row[f"clamp_rate/{name}"] = num_clamped[bucket] / num_wrong[bucket]
                row[f"negative_ratio/{name}"] = ratio[bucket] / num_wrong[bucket]
            if gradient[bucket]:
                row[f"gradient_share/{name}"] = gradient[bucket] / sum(gradient)
        return row


def bucket_sums(delta_N: Tensor, is_correct_N: Tensor, correct_rate_N: Tensor, clamped_N: Tensor, gradient_N: Tensor) -> Tensor:
    """Of these tokens (Δ = log R, r, r̂, whether clamped, ∂loss/∂logp), float64, one number a bucket for each of:

    tokens of wrong answers, those clamped, Σ x of wrong answers, Σ |∂loss/∂logp|.
    """
    wrong_N = ~is_correct_N
    ratio_N = 1 + negative_ratio_minus_one(delta_N, correct_rate_N)
    values_4N = torch.stack(
        [wrong_N.double(), (wrong_N & clamped_N).double(), ratio_N.double().where(wrong_N, 0.0), gradient_N.double().abs()]
    )
    bucket_N = (correct_rate_N * len(RATE_BUCKETS)).long().clamp(max=len(RATE_BUCKETS) - 1)
    return values_4N.new_zeros(4, len(RATE_BUCKETS)).index_add(1, bucket_N, values_4N).flatten()
