r"""Questions that a data set answers in two ways: whatever a model says, one of the two golds calls it wrong.

Two questions are the same when their texts differ only in what never changes the meaning: the wording around them, whitespace,
LaTeX's math delimiters and spacing commands, and full stops, commas and the like not followed by a digit. Letters, digits,
brackets and operators all count: ``x-1`` and ``x+1`` are two questions. Two golds are the same when they are equal as text or
as numbers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction

from nft_megatron.base.records import Question
from nft_megatron.data.wording import bare
from nft_megatron.verify.numbers import read_bare_number

_MEANINGLESS = re.compile(r"\\[()\[\],;:! ]|[\s$~]|[.,;:?'\"](?!\d)")


def text_key(question: Question) -> str:
    r"""The key that all spellings of one question share.

    >>> one, two = (Question("q", ({"role": "user", "content": text},), "1")
    ...             for text in ("Find $x$: \\(x + 1 = 2\\).", "Find\n$x$; $x+1=2$"))
    >>> text_key(one) == text_key(two)
    True
    """
    return _MEANINGLESS.sub("", bare(question.text))


def same_gold(one: str, other: str) -> bool:
    """Whether two golds are the same text or the same number.

    >>> same_gold("025", "25.0"), same_gold("1/2", "2")
    (True, False)
    """
    return _gold_key(one) == _gold_key(other)


def find_conflicts(questions: Sequence[Question]) -> list[list[Question]]:
    """The groups of equal questions with different golds, in the order of their first member."""
    same: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        same[text_key(question)].append(question)
    return [group for group in same.values() if len({_gold_key(question.gold) for question in group}) > 1]


def _gold_key(gold: str) -> Fraction | str:
    number = read_bare_number(gold)
    return gold.strip() if number is None else number
