r"""Whether two models differ on the same questions: McNemar's exact test, and the paired t-test over questions.

With d_q = share of right answers to question q of the first model − that of the second, over n questions,

    difference      mean of d_q, with standard error sd(d_q) / √n and the interval ± t₀.₉₇₅(n − 1) standard errors
    paired t        p = P(|T| ≥ |difference| / standard error), T of Student's t-distribution with n − 1 degrees of freedom
    McNemar         for one answer a question: the first model alone is right on b questions, the second alone on c.
                    p = min(1, 2·P(B ≤ min(b, c))), B ~ Binomial(b + c, ½): exact, also for few questions

Pairing removes the spread between questions, the larger part of either model's own standard error: of questions that are hard
for both, or easy for both, only the difference counts. As there, the questions are a sample and the unit: more answers per
question make d_q less noisy, but the questions remain n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

_EQUAL = 1e-12
"""Differences of shares that are as close are equal up to rounding."""


@dataclass(frozen=True)
class PairedDifference:
    """The first model's avg@k − the second's, as a share, over ``questions`` with judged answers of both.

    ``low`` and ``high`` bound 95 %. ``only_first`` and ``only_second`` count the questions on which one model's share is higher
    than the other's. What does not exist is NaN: the error of one question, or of differences that are all equal, but not 0.

    >>> pair = paired_difference([1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0], single=True)
    >>> pair.difference, pair.only_first, pair.only_second, pair.p_value, pair.test
    (0.5, 2, 0, 0.5, 'McNemar')
    """

    questions: int
    difference: float
    standard_error: float
    low: float
    high: float
    only_first: int
    only_second: int
    p_value: float
    test: Literal["McNemar", "paired t", "normal"]


def paired_difference(first: Sequence[float], second: Sequence[float], *, single: bool) -> PairedDifference:
    """Compare the shares of right answers to the same questions; ``single``: of one answer each, so that all are 0 or 1."""
    differences = np.subtract(np.asarray(first, float), np.asarray(second, float))
    num = len(differences)
    difference = float(differences.mean()) if num else math.nan
    error = float(differences.std(ddof=1) / math.sqrt(num)) if num > 1 else math.nan
    if num and np.ptp(differences) < _EQUAL:  # do not tell how far others would be
        error = math.nan if difference or num == 1 else 0.0
    width = t_quantile(num - 1) * error if num > 1 else math.nan
    counts = int((differences > 0).sum()), int((differences < 0).sum())
    p_value = mcnemar(*counts) if single and num else paired_t(difference, error, num)
    test: Literal["McNemar", "paired t"] = "McNemar" if single else "paired t"
    return PairedDifference(num, difference, error, difference - width, difference + width, *counts, p_value, test)


def mean_difference(pairs: Sequence[PairedDifference]) -> PairedDifference:
    """The mean over independent benchmarks, weighing them equally; its interval and p are those of a normal distribution."""
    difference = sum(pair.difference for pair in pairs) / len(pairs)
    error = math.sqrt(sum(pair.standard_error**2 for pair in pairs)) / len(pairs)
    p_value = math.erfc(abs(difference) / error / math.sqrt(2)) if error else 1.0
    firsts, seconds = sum(pair.only_first for pair in pairs), sum(pair.only_second for pair in pairs)
    num, width = sum(pair.questions for pair in pairs), 1.959964 * error
    return PairedDifference(num, difference, error, difference - width, difference + width, firsts, seconds, p_value, "normal")


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's exact test.

    >>> mcnemar(1, 8), mcnemar(3, 3)
    (0.0390625, 1.0)
    """
    num, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(num, k) for k in range(fewer + 1)) / 2**num)


def paired_t(difference: float, error: float, num: int) -> float:
    """Two-sided p of the paired t-test over ``num`` questions; NaN if the error is."""
    if math.isnan(error):
        return math.nan
    return two_sided(difference / error, num - 1) if error else 1.0


def two_sided(t: float, degrees: int) -> float:
    """P(|T| ≥ |t|) for Student's t with a whole number of degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    >>> round(two_sided(2.776445, 4), 6), round(two_sided(12.706205, 1), 6)
    (0.05, 0.05)
    """
    angle = math.atan(abs(t) / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return min(1.0, max(0.0, 1 - inside))


def t_quantile(degrees: int) -> float:
    """The t beyond which, on both sides together, 5 % of Student's t-distribution lie.

    >>> round(t_quantile(29), 4)
    2.0452
    """
    low, high = 0.0, 13.0  # 12.7 for one degree of freedom
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, degrees) > 0.05 else (low, middle)
    return high
