"""Metrics of a collected step: what its groups say about the policy that generated them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nft_megatron.base.records import Group
from nft_megatron.observe.metrics import MetricsRow
from nft_megatron.verify.reasons import reason_rates


def sampled_metrics(sampled: Sequence[Group], group_size: int) -> MetricsRow:
    """Over all questions sampled in a step, before the prompt filter; without any, only their number."""
    metrics: MetricsRow = {"groups_sampled": len(sampled), "groups_mixed": sum(group.is_mixed for group in sampled)}
    if not sampled:
        return metrics
    answers = [answer for group in sampled for answer in group.answers]
    judged = sum(group.num_judged for group in sampled)
    lengths = np.array([len(answer.completion.tokens) for answer in answers])
    rates = [group.correct_rate for group in sampled if group.num_judged]
    bins = np.histogram(rates, bins=group_size + 1, range=(0, 1))[0]
    logprobs = np.concatenate([answer.completion.logprobs for answer in answers])
    return metrics | {
        "accuracy": sum(group.num_correct for group in sampled) / judged if judged else math.nan,
        "correct_rate_histogram": bins.tolist(),
        "truncated_rate": float(np.mean([answer.completion.finish_reason == "length" for answer in answers])),
        "unknown_rate": 1 - judged / len(answers),
        **{f"verdict/{reason}": share for reason, share in reason_rates(answer.verdict for answer in answers).items()},
        "answer_length_mean": float(lengths.mean()),
        "answer_length_p90": float(np.percentile(lengths, 90)),
        "answer_length_max": int(lengths.max()),
        "response_tokens": int(lengths.sum()),
        "entropy_sampled": -float(logprobs.mean(dtype=np.float64)),
    }


def trained_metrics(step: int, trained: Sequence[Group]) -> MetricsRow:
    """Over the groups that pass the filter: their number, and how many steps behind their oldest answer is."""
    oldest = min(answer.completion.weight_version for group in trained for answer in group.answers)
    return {"groups_trained": len(trained), "staleness_max": step - 1 - oldest}
