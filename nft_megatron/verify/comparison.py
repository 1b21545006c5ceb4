r"""Compares the content of a box with the gold, as far as exact rules can. Pure functions.

Whole spellings come first. Then names go (``x = 5`` for 5), and what is left is compared as what the gold is: an equation, a
number, a ratio or the like (:mod:`~nft_megatron.verify.forms`), a listing, an interval or an expression.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction

from nft_megatron.base.records import Verdict
from nft_megatron.verify.equations import assigned, is_name, sides
from nft_megatron.verify.expressions import same_value
from nft_megatron.verify.forms import compare_forms
from nft_megatron.verify.intervals import as_interval, is_interval, without_member
from nft_megatron.verify.listings import compare_listings, is_named, read_listing
from nft_megatron.verify.numbers import (
    is_arithmetic,
    is_decimal,
    is_digits,
    nearly_equal,
    read_number,
    same_spelling,
    same_value_spelling,
    tight,
)
from nft_megatron.verify.reasons import verdict
from nft_megatron.verify.units import units_clash, without_same_unit

STRICT = "strict/4"


@functools.cache
def _decided(reason: str) -> Verdict:
    return verdict(reason, STRICT)


@dataclass(frozen=True)
class Undecided:
    """Only computer algebra can tell whether ``text`` gives ``gold`` as its answer, or a user's verifier, which may also need
    the ``question``."""

    text: str
    gold: str
    question: str = ""


def compare(answer: str, gold: str) -> Verdict | Undecided:
    """The verdict on ``answer``, both in the spelling of :func:`~nft_megatron.verify.spelling.plain`."""
    if answer == gold:
        return _decided("exact")
    if is_digits(gold):
        return _compare_number(stated_part(answer), Fraction(int(gold)), gold)
    if same_spelling(answer, gold):
        return _decided("exact")
    if "=" in gold and not is_named(gold) and len(sides(gold)) > 1:
        if len(sides(answer)) > 1 and not is_named(answer):
            return _compare_equations(answer, gold)
        value = stated_part(gold)
        if value == gold:  # an equation is no value
            return _decided("not equal")
        return compare(answer, value)
    return _compare_values(stated_part(answer), gold)


def stated_part(text: str) -> str:
    r"""The value in ``name = value`` or in true arithmetic, ``name = arithmetic = value``; any other text unchanged.

    >>> [stated_part(text) for text in ("n = 75", "m+n = 30+4 = 34", "m = n = 5", "1 = 34", "5+7 = 12", "x^2 = 9")]
    ['75', '34', '5', '1 = 34', '12', 'x^2 = 9']
    """
    parts = sides(text)
    if len(parts) == 1:
        return text
    if pair := assigned(text):
        return pair[1]
    num_names = next((i for i, part in enumerate(parts) if not is_name(part)), 0)
    if num_names > 1 and num_names == len(parts) - 1:  # m = n = 5
        return parts[-1]
    has_name = num_names == 1
    values = parts[1:] if has_name else parts
    if len(values) < 2 or not all(read_number(value) is not None or is_arithmetic(value) for value in values):
        return text
    accepted = (True, None) if has_name else (True,)  # nobody names what is not meant
    return values[-1] if all(_is_same(value, values[-1]) in accepted for value in values) else text


def _is_same(one: str, other: str) -> bool | None:
    number, other_number = read_number(one), read_number(other)
    return number == other_number if number is not None and other_number is not None else same_value(one, other)


def _compare_equations(answer: str, gold: str) -> Verdict | Undecided:
    """By name and value where both have a name; else as equations, left to algebra."""
    pairs = [assigned(text) or (sides(text)[0], stated_part(text)) for text in (answer, gold)]
    (name, value), (gold_name, gold_value) = pairs
    if is_name(name) and is_name(gold_name) and value != answer and gold_value != gold:
        if same_spelling(name, gold_name):
            return compare(value, gold_value)
        if read_number(value) is not None and read_number(gold_value) is not None:
            return _decided("not equal")
    return _to_compare(answer, gold)


def _compare_values(answer: str, gold: str) -> Verdict | Undecided:
    """Neither is an equation with a name any more, nor the gold any equation."""
    if units_clash(answer, gold):
        return _decided("not equal")
    if rests := without_same_unit(answer, gold):
        return compare(*rests)
    gold_number = read_gold_number(gold)
    if gold_number is not None:
        return _compare_number(answer, gold_number, gold)
    if same_value_spelling(answer, gold):
        return _decided("exact")
    if (same := compare_forms(answer, gold)) is not None:
        return _settled(same)
    answer, gold = _as_intervals(answer, gold)
    if same_spelling(answer, gold):
        return _decided("equal")
    listing, gold_listing = read_listing(answer), read_listing(gold)
    if listing and gold_listing:
        outcome = compare_listings(listing, gold_listing)
        return _settled(outcome) if isinstance(outcome, bool) else _to_compare(*outcome)
    if len(sides(answer)) > 1 and not is_named(answer):
        return _decided("not equal")
    return _by_value(answer, gold)


def _compare_number(answer: str, gold_number: Fraction, gold: str) -> Verdict | Undecided:
    number, is_integer = read_number(answer), gold_number.denominator == 1
    if number is not None:
        if _is_part_in_percent(answer, gold_number, gold):
            number /= 100
        if number == gold_number:
            return _decided("exact")
        if _is_percentage(number, answer, gold_number, gold):
            return _decided("equal")
        may_be_rounded = not is_integer and is_decimal(answer) != is_decimal(gold)
        return verdict("equal" if may_be_rounded and nearly_equal(number, gold_number) else "another number", STRICT)
    if is_integer and not is_arithmetic(answer):
        return _decided("not a number")
    if len(sides(answer)) > 1:
        return _decided("not equal")
    if ":" in answer:
        return _settled(compare_forms(gold, answer) is True)
    return _by_value(answer, gold)


def read_gold_number(gold: str) -> Fraction | None:
    """The number that ``gold`` states; ``(2,251,252)`` states three."""
    return None if "," in gold and tight(gold).startswith("(") else read_number(gold)


def _is_percentage(number: Fraction, answer: str, gold_number: Fraction, gold: str) -> bool:
    r"""``0.25`` for ``25\%`` and the reverse; a whole number is never taken for a hundred times as much."""
    if "%" in gold:
        return number.denominator > 1 and "%" not in answer and number * 100 == gold_number
    return gold_number.denominator > 1 and "%" in answer and number == gold_number * 100


def _is_part_in_percent(answer: str, gold_number: Fraction, gold: str) -> bool:
    r"""``50\%`` for ``\frac{1}{2}``: a fraction below 1 is a part, not a number of percent."""
    return "%" in answer and "%" not in gold and 0 < gold_number < 1 and not is_decimal(gold)


def _as_intervals(answer: str, gold: str) -> tuple[str, str]:
    r"""If exactly one of both is an inequality and the other an interval, both as intervals."""
    interval, gold_interval = as_interval(answer), as_interval(gold)
    if (interval is None) == (gold_interval is None):
        return answer, gold
    texts = [
        text.replace(r"+\infty", r"\infty")
        for text in (interval or without_member(answer), gold_interval or without_member(gold))
    ]
    return (texts[0], texts[1]) if all(map(is_interval, texts)) else (answer, gold)


def _by_value(answer: str, gold: str) -> Verdict | Undecided:
    same = same_value(answer, gold)
    return _to_compare(answer, gold) if same is None else _settled(same)


def _settled(same: bool) -> Verdict:
    return _decided("equal" if same else "not equal")


def _to_compare(answer: str, gold: str) -> Undecided:
    return Undecided(rf"\boxed{{{answer}}}", gold)
