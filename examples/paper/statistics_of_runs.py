"""Means over seeds, differences of runs that share a start, and which difference so many seeds can show."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

T_QUANTILES = {
    1: (12.706, 1.376), 2: (4.303, 1.061), 3: (3.182, 0.978), 4: (2.776, 0.941), 5: (2.571, 0.920), 6: (2.447, 0.906),
    7: (2.365, 0.896), 8: (2.306, 0.889), 9: (2.262, 0.883), 11: (2.201, 0.876), 15: (2.131, 0.866),
}  # fmt: skip
"""Student's t at 97.5 % and at 80 %, by degrees of freedom."""


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
    """The difference that a paired t-test at 5 % finds in four of five comparisons: (t₉₇.₅ + t₈₀)·deviation / √seeds.

    ``deviation`` is that of the differences between two runs from one start.

    >>> round(smallest_visible(0.01, 4), 4)
    0.0208
    """
    high, low = T_QUANTILES[max(df for df in T_QUANTILES if df <= num_seeds - 1)]
    return (high + low) * deviation / math.sqrt(num_seeds)


def half_width(deviation: float, num_seeds: int) -> float:
    """Of the 95 % interval around a mean of ``num_seeds``."""
    return T_QUANTILES[max(df for df in T_QUANTILES if df <= num_seeds - 1)][0] * deviation / math.sqrt(num_seeds)


def accuracy_by_samples(rows: Sequence[Mapping[str, Any]], answers_per_question: int) -> list[tuple[int, float]]:
    """Held-out accuracy after so many sampled answers, from the rows of RUN/metrics.jsonl; first the model before training.

    >>> accuracy_by_samples([{"groups_sampled": 10, "eval_accuracy_initial": 0.2, "eval_accuracy": 0.5}], 16)
    [(0, 0.2), (160, 0.5)]
    """
    points = [(0, row["eval_accuracy_initial"]) for row in rows[:1] if "eval_accuracy_initial" in row]
    num_answers = 0
    for row in rows:
        num_answers += row["groups_sampled"] * answers_per_question
        if "eval_accuracy" in row:
            points.append((num_answers, row["eval_accuracy"]))
    return points


def accuracy_at(points: Sequence[tuple[int, float]], num_answers: int) -> float:
    """Between two evaluations on the straight line that joins them; after the last one its own.

    >>> accuracy_at([(0, 0.2), (100, 0.4)], 50)
    0.30000000000000004
    """
    for (before, low), (after, high) in itertools.pairwise(points):
        if num_answers <= after:
            return low + (high - low) * (num_answers - before) / (after - before)
    return points[-1][1]
