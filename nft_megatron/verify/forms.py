r"""Answers that are no expressions: numbers of a base, ratios, clock times and words. Pure functions."""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from nft_megatron.verify.numbers import read_bare_number, same_spelling, tight

_REMEMBERED = 4096  # texts without their fonts

_BASE = re.compile(r"\(?([0-9A-Z]++)\)?_\{?([0-9]++|[a-z]++)\}?")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|textnormal)\s*+\{([^{}]*+)\}")
_CLOCK = re.compile(r"([0-9]{1,2}+):([0-5][0-9])(?::([0-5][0-9]))?+\s*+([ap])?+(?:\.?m\.?)?+", re.IGNORECASE)
_WORDS = re.compile(r"[A-Za-z][A-Za-z '.-]*+")
_LETTERS = re.compile("[A-Za-z]++")
_TO = re.compile(r"(?<=[0-9}])\s*+to\s*+(?=[0-9\\])")
_NO_WORD = re.compile(r"[0-9^_=+*/<>\[\]()]")
_DIGIT_NAMES = {
    name: str(number)
    for number, name in enumerate(
        ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"], start=2
    )
}


def compare_forms(answer: str, gold: str) -> bool | None:
    r"""Whether answer and gold are the same, if the gold has one of these forms; None if it has none.

    >>> compare_forms("110_2", "110_3"), compare_forms("08:00", "8:00"), compare_forms("2:4:6", "1:2:3")
    (False, True, True)
    >>> compare_forms("listen", "silent"), compare_forms(r"\text{Yes}", "yes."), compare_forms("yx", "xy")
    (False, True, None)
    """
    for compare in (_compare_bases, _compare_clocks, _compare_ratios, _compare_words):
        if (same := compare(answer, gold)) is not None:
            return same
    return None


def _compare_bases(answer: str, gold: str) -> bool | None:
    """The base belongs to the number: 20_3 is not 110_2. An answer without a base is left to the digits."""
    if "_" not in gold or "_" not in answer:
        return None
    base, gold_base = _BASE.fullmatch(_untext(answer)), _BASE.fullmatch(_untext(gold))
    if base is None or gold_base is None or not _is_base(base[2]) or not _is_base(gold_base[2]):
        return None
    return base[1].lstrip("0") == gold_base[1].lstrip("0") and _number_of(base[2]) == _number_of(gold_base[2])


def _is_base(index: str) -> bool:
    return index.isdigit() or index in _DIGIT_NAMES


def _number_of(index: str) -> str:
    return _DIGIT_NAMES.get(index, index)


def _compare_clocks(answer: str, gold: str) -> bool | None:
    """As written, so that 2:40 is not 1:20; a.m. and p.m. count where both say them."""
    if (
        ":" not in gold
        or (gold_clock := _CLOCK.fullmatch(_untext(gold))) is None
        or (clock := _CLOCK.fullmatch(_untext(answer))) is None
    ):
        return None
    (*time, half), (*gold_time, gold_half) = clock.groups(), gold_clock.groups()
    is_same_half = not half or not gold_half or half.lower() == gold_half.lower()
    return [int(number or 0) for number in time] == [int(number or 0) for number in gold_time] and is_same_half


def _compare_ratios(answer: str, gold: str) -> bool | None:
    r"""Ratios are the same if proportional; ``\frac{3}{4}`` is 3:4."""
    if ":" not in gold or "=" in gold + answer or r"\{" in gold:
        return None
    gold_parts = _untext(gold).split(":")
    parts = _TO.sub(":", _untext(answer)).split(":")
    if len(parts) == 1 and len(gold_parts) == 2 and (value := read_bare_number(answer)) is not None:
        numbers: list[Fraction | None] = [value, Fraction(1)]
    else:
        numbers = [read_bare_number(part) for part in parts]
    gold_numbers = [read_bare_number(part) for part in gold_parts]
    if None in numbers + gold_numbers:
        return (
            len(parts) == len(gold_parts) and all(map(same_spelling, parts, gold_parts))
            if len(parts) == len(gold_parts) > 1
            else None
        )
    if len(numbers) != len(gold_numbers):
        return False
    pairs = [
        (number, gold_number)
        for number, gold_number in zip(numbers, gold_numbers, strict=True)
        if number is not None and gold_number is not None
    ]
    (first, gold_first), *rest = pairs
    if not first or not gold_first:
        return pairs[0][0] == pairs[0][1] and numbers == gold_numbers
    return all(number * gold_first == gold_number * first for number, gold_number in rest)


def _compare_words(answer: str, gold: str) -> bool | None:
    """Words are the same if spelled the same, in any case.

    Three letters side by side are a word; two may be a product, but not with an o (no, on).
    """
    if _NO_WORD.search(gold):
        return None
    words, gold_words = _untext(answer), _untext(gold)
    if not (_WORDS.fullmatch(words) and _WORDS.fullmatch(gold_words)):
        return None
    is_text = "{" in answer or "{" in gold or any(len(word) > 2 or "o" in word for word in _LETTERS.findall(gold_words))
    if not is_text:
        return None
    return _bare(words) == _bare(gold_words)


def _bare(words: str) -> str:
    return "".join(re.sub("[.'-]", " ", words).lower().split())


@functools.lru_cache(_REMEMBERED)
def _untext(text: str) -> str:
    """Without fonts and the formula's dollars, and without a full stop at the end."""
    return _TEXT.sub(r"\1", tight(text).replace("$", "")).replace("~", " ").strip().removesuffix(".").strip()
