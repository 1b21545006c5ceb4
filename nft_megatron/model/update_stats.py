"""Statistics of an update over all ranks, and a step's updates as metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nft_megatron.model.optimizer import Update
from nft_megatron.model.policy_sums import PolicySums
from nft_megatron.observe.metrics import MetricsRow
from nft_megatron.observe.rate_buckets import RateBuckets


@dataclass(frozen=True)
class UpdateStats:
    """Statistics of one optimizer step over all ranks: sums over tokens, except ``loss_*``, which carry ω/D.

    ``gradient_cosine`` is None if it was not measured. ``policy`` covers what no pass for old log-probs measured.

    >>> applied = Update(grad_norm=0.7, learning_rate=1e-6)
    >>> stats = UpdateStats(0.4, 0.2, 0.5, 3, 40, 100, 0.1, RateBuckets(), None, applied)
    >>> row = summarize([stats], num_updates=1)
    >>> row["kl_old"], row["clamp_rate"]
    (0.005, 0.075)
    """

    loss_positive: float
    loss_negative: float
    kl_sum: float
    num_clamped: float
    num_wrong_tokens: float
    num_tokens: int
    log_ratio_max: float
    buckets: RateBuckets
    gradient_cosine: float | None
    applied: Update
    policy: PolicySums = field(default_factory=PolicySums)


def summarize(updates: Sequence[UpdateStats], num_updates: int) -> MetricsRow:
    """The metrics of a rollout step's updates; ``num_updates`` were applied since the start of the run."""
    loss_positive = float(np.mean([update.loss_positive for update in updates]))
    loss_negative = float(np.mean([update.loss_negative for update in updates]))
    num_wrong = sum(update.num_wrong_tokens for update in updates)
    finite = [update.applied.grad_norm for update in updates if not update.applied.skipped] or [float("nan")]
    return {
        "updates": num_updates,
        "loss": loss_positive + loss_negative,
        "loss_positive": loss_positive,
        "loss_negative": loss_negative,
        "grad_norm": float(np.mean(finite)),
        "grad_norm_max": max(finite),
        "learning_rate": updates[-1].applied.learning_rate,
        "kl_old": sum(update.kl_sum for update in updates) / max(sum(update.num_tokens for update in updates), 1),
        "ratio_max": float(np.exp(max(update.log_ratio_max for update in updates))),
        "clamp_rate": sum(update.num_clamped for update in updates) / num_wrong if num_wrong else 0.0,
        "skipped_updates": sum(update.applied.skipped for update in updates),
        **sum((update.buckets for update in updates), start=RateBuckets()).metrics(),
    } | ({} if updates[0].gradient_cosine is None else {"gradient_cosine": updates[0].gradient_cosine})
