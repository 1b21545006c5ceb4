r"""Questions that a data set answers in two ways: whatever a model says, one of the two golds calls it wrong.

Two questions are the same when their texts differ only in what never changes the meaning: the wording around them, whitespace,
LaTeX's math delimiters and spacing commands, and sentence punctuation. Letters, digits, brackets, operators and primes all
count: ``x-1`` and ``x+1`` are two questions, ``f(2)`` and ``f'(2)``, ``(a,b)`` and ``(ab)``, ``a:b`` and ``ab``, ``1, 2`` and
``12`` too. Two golds are the same when they are equal as numbers or as LaTeX, however it is spelled (``\dfrac{\pi}{2}`` and
``\pi/2``), or when the strict verifier's exact rules accept one of them as an answer to the other.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from decimal import Context, Decimal
from fractions import Fraction

from nft_megatron.base.records import Question, Verdict
from nft_megatron.data.wording import bare
from nft_megatron.verify.expressions import value_of
from nft_megatron.verify.grade import grade
from nft_megatron.verify.numbers import read_bare_number, tight
from nft_megatron.verify.spelling import plain

_MEANINGLESS = re.compile(r"\\[()\[\],;:! ]|[\s$~\"]|[.,;:?](?!\d)")
_PRIME = re.compile(r"\^\s*(?:\{\s*((?:\\prime\s*)+)\}|(\\prime(?![A-Za-z])))|[’′]")
_APOSTROPHE = re.compile(r"(?<=[A-Za-z])'(?=(?:s|t|re|ve|ll|d|m)\b)|(?<![\w)\]}'])'")  # Ann's, don't, and an opening quote
_IN_BRACKETS = re.compile(r"[(\[{][^()\[\]{}]*[)\]}]")
_RATIO = re.compile(r"(?<=[\w})\]]):(?=[\w\\({\[])")
_WITHOUT_BRACES = re.compile(r"\\[dt]?frac\s*(\\[A-Za-z]+)\s*(\w)")
_ROUNDED = Context(prec=50)
_BLANK = r"(?:[\s$~]|\\[ ;:!])"
_BETWEEN_NUMBERS = re.compile(rf"(?<=\d)(?:{_BLANK}*[,;](?:{_BLANK}|\\,)+|{_BLANK}+)(?=\d)")  # not 12\,345
_MATH = re.compile(r"\\[()\[\]]|\$")
_KEPT_COMMA, _KEPT_COLON = "\ue000", "\ue001"


def text_key(question: Question) -> str:
    r"""The key that all spellings of one question share.

    >>> one, two = (Question("q", ({"role": "user", "content": text},), "1")
    ...             for text in ("Find $x$: \\(x + 1 = 2\\).", "Find\n$x$; $x+1=2$"))
    >>> text_key(one) == text_key(two)
    True
    """
    text = _PRIME.sub(lambda match: "'" * max(1, match.group().count("prime")), bare(question.text))
    text = _BETWEEN_NUMBERS.sub(",", text)
    text = _IN_BRACKETS.sub(lambda match: match.group().replace(",", _KEPT_COMMA), _APOSTROPHE.sub("", text))
    return _MEANINGLESS.sub("", _RATIO.sub(_KEPT_COLON, text))


def same_gold(one: str, other: str) -> bool:
    r"""Whether two golds are the same number, the same LaTeX, or answers to each other.

    >>> same_gold("025", "25.0"), same_gold("1/2", "2"), same_gold(r"$\dfrac{\pi}{2}$", "π/2"), same_gold("x=5", "5")
    (True, False, True, True)
    """
    return _gold_key(one) == _gold_key(other) or _accepts(one, other) or _accepts(other, one)


def _accepts(gold: str, answer: str) -> bool:
    verdict = grade(rf"\boxed{{{answer}}}", gold, "stop")
    return isinstance(verdict, Verdict) and verdict.label == "correct"


def find_conflicts(questions: Sequence[Question]) -> list[list[Question]]:
    """The groups of equal questions with different golds, in the order of their first member."""
    same: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        same[text_key(question)].append(question)
    return [group for group in same.values() if not all(same_gold(group[0].gold, question.gold) for question in group[1:])]


def _gold_key(gold: str) -> Fraction | Decimal | str:
    number = read_bare_number(gold)
    gold = _WITHOUT_BRACES.sub(r"\\frac{\1}{\2}", plain(gold))
    value = value_of(gold) if number is None else number
    if isinstance(value, Decimal):
        return _ROUNDED.plus(value)
    return tight(_MATH.sub("", gold)).strip() if value is None else value
