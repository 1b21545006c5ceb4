"""Entropy of the policy and its distance from the engine, as sums over tokens that any pass over the packs can measure.

The pass for old log-probs measures the packs that it goes through, and the updates all others, so that each token counts once.

Suffix ``_N``: one entry per loss token of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nft_megatron.batching.batch import MicroBatch
from nft_megatron.observe.metrics import MetricsRow
from nft_megatron.observe.mismatch import MismatchSums, mismatch_sums

POLICY_WIDTH = 7
"""Of a row: the largest mismatch, the five sums of :class:`MismatchSums`, the entropy."""


@dataclass(frozen=True)
class PolicySums:
    """Sums over the tokens of all ranks; the mismatch only of tokens that the trainer's weights generated.

    >>> (PolicySums(3.0) + PolicySums(1.0)).metrics(num_tokens=8)["entropy"]
    0.5
    """

    entropy: float = 0.0
    mismatch: MismatchSums = field(default_factory=MismatchSums)

    @classmethod
    def of(cls, largest: float, *sums: float) -> PolicySums:
        """From a :func:`policy_row`, added up over micro-batches and ranks, but of the first number the largest."""
        *mismatch, entropy = sums
        return cls(entropy, MismatchSums(tuple(mismatch), max(largest, 0.0)))

    def __add__(self, other: PolicySums) -> PolicySums:
        return PolicySums(self.entropy + other.entropy, self.mismatch + other.mismatch)

    def metrics(self, num_tokens: int) -> MetricsRow:
        """The entropy, a mean over ``num_tokens``, and the metrics of the mismatch."""
        return {"entropy": self.entropy / max(num_tokens, 1)} | self.mismatch.metrics()


def needs_entropy(micro_batch: MicroBatch) -> bool:
    """Whether the update measures the entropy of any token of this pack: of those that the pass for old log-probs left out."""
    return micro_batch.has_stale or not micro_batch.recomputes


def policy_row(
    micro_batch: MicroBatch, logprob_N: Tensor, entropy_N: Tensor | None, *, in_update: bool, measures_mismatch: bool
) -> Tensor:
    """``POLICY_WIDTH`` numbers of a pack, float64; zeros without ``entropy_N``.

    The pass for old log-probs measures the entropy of answers of the current weights, the update that of older ones, whichever
    packs the pass goes through: which ones those are depends on the layout, and the metric must not.
    ``measures_mismatch``: whether the weights are those of the step's start, which generated all answers that are not stale.
    """
    if entropy_N is None:
        return logprob_N.new_zeros(POLICY_WIDTH, dtype=torch.float64)
    is_stale_N = micro_batch.is_stale_N
    counts_N = ~is_stale_N if measures_mismatch else torch.zeros_like(is_stale_N)
    mismatch = mismatch_sums(logprob_N - micro_batch.engine_logprob_N, counts_N)
    if micro_batch.recomputes:
        entropy_N = torch.where(is_stale_N == in_update, entropy_N, 0)
    return torch.cat((mismatch, entropy_N.sum(dtype=torch.float64)[None]))
