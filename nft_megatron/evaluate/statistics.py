r"""What judged answers say about a model: avg@k, its standard error, pass@k, maj@k. All questions weigh the same; answers that
could not be judged are left out, and so is a question with no judged answer.

avg@k
    the share of correct answers, averaged over questions. Its standard error is that of a mean of independent questions,
    sd(shares) / sqrt(questions): the answers to one question are a cluster (Miller 2024, arXiv 2411.00640, section 2.2), so
    more samples of 30 questions cannot make it arbitrarily small.
pass@k
    the chance that at least one of k answers is correct, estimated without bias from n ≥ k answers of which c are correct:
    1 − C(n − c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, Eq. 1).
maj@k
    whether the most frequent of all k answers is correct. A tie counts as the share of the tied answers that are correct,
    the average of drawing one of them. A response that was cut off or has no final answer does not vote; a question without
    votes counts as wrong.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Judged:
    """The judged answers to one question: which are correct, and what each votes for (None: no vote).

    >>> question = Judged((True, False, True), ("3", "4", "3"))
    >>> question.share, question.pass_at(2), question.majority
    (0.6666666666666666, 1.0, 1.0)
    """

    right: tuple[bool, ...]
    votes: tuple[str | None, ...]

    @property
    def share(self) -> float:
        return sum(self.right) / len(self.right)

    def pass_at(self, k: int) -> float:
        """NaN with fewer than ``k`` answers."""
        num, num_wrong = len(self.right), len(self.right) - sum(self.right)
        return 1 - math.comb(num_wrong, k) / math.comb(num, k) if k <= num else math.nan

    @property
    def majority(self) -> float:
        rights: dict[str, list[bool]] = defaultdict(list)
        for vote, right in zip(self.votes, self.right, strict=True):
            if vote is not None:
                rights[vote].append(right)
        most = max(map(len, rights.values()), default=0)
        tied = [sum(members) / most for members in rights.values() if len(members) == most]
        return sum(tied) / len(tied) if tied else 0.0


def average(questions: Sequence[Judged]) -> float:
    """avg@k; NaN without questions."""
    return _mean([question.share for question in questions])


def standard_error(questions: Sequence[Judged]) -> float:
    """The standard error of :func:`average`, clustered by question; NaN for fewer than two questions."""
    shares = [question.share for question in questions]
    return float(np.std(shares, ddof=1) / np.sqrt(len(shares))) if len(shares) > 1 else math.nan


def pass_at(questions: Sequence[Judged], k: int) -> float:
    """pass@k over the questions with at least ``k`` judged answers; NaN if there are none."""
    return _mean([question.pass_at(k) for question in questions if len(question.right) >= k])


def majority(questions: Sequence[Judged]) -> float:
    """maj@k; NaN without questions."""
    return _mean([question.majority for question in questions])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
