"""Strict verdicts on equations, units, listings, intervals and spellings, against verdicts written by hand.

The comparisons of a worker run in this process, without its deadlines.
"""

import pytest
from own_answers import Case
from strict_answers import ADVERSARIAL, REPORTED, STRICT

from nft_megatron.verify.comparison import Undecided
from nft_megatron.verify.grade import grade
from nft_megatron.verify.reasons import REASONS
from nft_megatron.verify.worker import judge_strict


def label_of(text: str, gold: str) -> str:
    verdict = grade(text, gold, "stop")
    return REASONS[judge_strict(verdict.gold, verdict.text)[0]][0] if isinstance(verdict, Undecided) else verdict.label


@pytest.mark.parametrize("case", [*STRICT, *REPORTED, *ADVERSARIAL])
def test_verdict(case: Case) -> None:
    assert label_of(case.text, case.gold) == ("correct" if case.is_right else "wrong")
