"""Curves over sampled answers, means over seeds, paired differences between runs, and the smallest that n seeds can show."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

T_QUANTILES = {
    1: (12.706, 1.376),
    2: (4.303, 1.061),
    3: (3.182, 0.978),
    4: (2.776, 0.941),
    5: (2.571, 0.920),
    6: (2.447, 0.906),
    7: (2.365, 0.896),
    8: (2.306, 0.889),
    9: (2.262, 0.883),
    11: (2.201, 0.876),
    15: (2.131, 0.866),
}
"""Student's t at 97.5 % and at 80 %, by degrees of freedom."""

LATE = (0.75, 0.8125, 0.875, 0.9375, 1.0)
"""Shares of the budget at which a curve is read to judge a run: a single evaluation is as noisy as its weights."""

Points = list[tuple[int, float]]
"""(answers sampled so far, value), in order."""
Kind = Literal["above", "below", "at least", "about"]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and unbiased standard deviation.

    >>> mean_and_deviation([1.0, 3.0])
    (2.0, 1.4142135623730951)
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def smallest_visible(deviation: float, num_seeds: int) -> float:
    """The difference that a paired t-test at 5 % detects in four of five comparisons: (t₉₇.₅ + t₈₀)·deviation / √seeds.

    ``deviation`` is that of the differences between two runs from one start.

    >>> round(smallest_visible(0.01, 4), 4)
    0.0208
    """
    return sum(_quantiles(num_seeds)) * deviation / math.sqrt(num_seeds)


def half_width(deviation: float, num_seeds: int) -> float:
    """Half the 95 % interval around a mean of ``num_seeds``; NaN for one."""
    return _quantiles(num_seeds)[0] * deviation / math.sqrt(num_seeds)


def _quantiles(num_seeds: int) -> tuple[float, float]:
    """Uses fewer degrees of freedom if the table lacks the exact number: wider, never narrower."""
    return T_QUANTILES[max((df for df in T_QUANTILES if df <= num_seeds - 1), default=1)]


def verdict(kind: Kind, mean: float, width: float, margin: float) -> str:
    """What the interval ``mean`` ± ``width`` of a difference says about a finding; ``margin`` counts as equal.

    >>> [verdict("above", mean, 0.01, 0.03) for mean in (0.02, 0.005, -0.02)]
    ['seen', 'not shown', 'the opposite']
    >>> [verdict("about", mean, 0.01, 0.03) for mean in (0.01, 0.025, 0.05)]
    ['seen', 'not shown', 'the opposite']
    """
    if kind == "below":
        return verdict("above", -mean, width, margin)
    if kind == "about":
        return "seen" if abs(mean) + width <= margin else "the opposite" if abs(mean) - width > margin else "not shown"
    bound = 0.0 if kind == "above" else -margin
    return "seen" if mean - width > bound else "the opposite" if mean + width < 0 else "not shown"


def accuracy_by_samples(rows: Sequence[Mapping[str, Any]], group_size: int) -> Points:
    """Held-out accuracy, from the rows of RUN/metrics.jsonl; first the model before training.

    >>> accuracy_by_samples([{"groups_sampled": 10, "eval_accuracy_initial": 0.2, "eval_accuracy": 0.5}], 16)
    [(0, 0.2), (160, 0.5)]
    """
    points = [(0, row["eval_accuracy_initial"]) for row in rows[:1] if "eval_accuracy_initial" in row]
    counts = itertools.accumulate(row["groups_sampled"] * group_size for row in rows)
    return points + [(count, row["eval_accuracy"]) for count, row in zip(counts, rows, strict=True) if "eval_accuracy" in row]


def entropy_by_samples(rows: Sequence[Mapping[str, Any]], group_size: int) -> Points:
    """Entropy of the answers of each step, at the count before it: they come from the weights that earlier steps left.

    >>> entropy_by_samples([{"groups_sampled": 10, "entropy_sampled": 0.2}, {"groups_sampled": 9, "entropy_sampled": 0.1}], 16)
    [(0, 0.2), (160, 0.1)]
    """
    counts = itertools.accumulate((row["groups_sampled"] * group_size for row in rows), initial=0)
    return [(count, row["entropy_sampled"]) for count, row in zip(counts, rows, strict=False) if "entropy_sampled" in row]


def value_at(points: Points, num_answers: float) -> float:
    """Linear interpolation between points; after the last point, its value.

    >>> value_at([(0, 0.2), (100, 0.4)], 50)
    0.30000000000000004
    """
    for (before, low), (after, high) in itertools.pairwise(points):
        if num_answers <= after:
            return low + (high - low) * (num_answers - before) / (after - before)
    return points[-1][1]


def late_mean(points: Points, budget: int) -> float:
    """Mean of the curve over the last quarter of ``budget`` sampled answers."""
    return math.fsum(value_at(points, share * budget) for share in LATE) / len(LATE)
