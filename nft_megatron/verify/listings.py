r"""Lists, tuples and sets: which of their differences count. Pure functions.

``(a,b)`` and ``[a,b]`` are ordered, ``\{a,b\}`` and ``a, b`` are not; beside a tuple a list without brackets is read in its
order. A set is no tuple. Elements count as often as they are written, except between two sets in braces. ``x=3, y=5`` is the
tuple ``(3,5)`` if its names are in the order of the alphabet, and two lists of named values are compared name by name.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from nft_megatron.verify.equations import assigned
from nft_megatron.verify.expressions import differ
from nft_megatron.verify.numbers import read_number, same_spelling, tight

_AND = re.compile(
    r"(?:,\s*+)?+(?:\\(?:text|mbox|mathrm|textrm)\s*+\{[\s,]*+(?:and|or)[\s,]*+\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|;|\\qquad|\\quad"
    r")(?:\s*+,)?+"
)
_DOTS = re.compile(r"\\(?:[lcvd]dots|dots[cb]?)(?![A-Za-z])|\.\.\.")
_BRACES = ("\\{", "\\}")


@dataclass(frozen=True)
class Listing:
    """``items`` between brackets: ``(``, ``[``, ``{`` of a set, or "" for none."""

    bracket: str
    closing: str
    items: list[str]

    @property
    def num_values(self) -> int:
        r"""How many values there are; ``a \pm b`` is two."""
        return sum(2 if r"\pm" in item else 1 for item in self.items)

    @property
    def text(self) -> str:
        inside = ", ".join(self.items)
        return {"{": rf"\{{{inside}\}}", "": inside}.get(self.bracket, f"{self.bracket}{inside}{self.closing}")


def read_listing(text: str) -> Listing | None:
    r"""``text`` as a listing; None if it is a single thing or if its brackets do not match.

    >>> read_listing(r"\left(3, \frac{\pi}{2}\right]"), read_listing(r"x = 1 \text{ or } x = 2").items, read_listing("f(1,2)")
    (Listing(bracket='(', closing=']', items=['3', '\\frac{\\pi}{2}']), ['x=1', 'x=2'], None)
    """
    if "," not in text and r"\{" not in text and not _AND.search(text):
        return None
    text = tight(_AND.sub(",", text)).rstrip(".")
    if r"\begin" in text or "|" in text or ":" in text or r"\mid" in text:
        return None
    bracket, closing, inside = "", "", text
    if text.startswith(r"\{") and text.endswith(r"\}"):
        bracket, closing, inside = "{", "}", text[2:-2]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        bracket, closing, inside = text[0], text[-1], text[1:-1]
    items = _split(inside)
    if items is None and bracket:  # "(1,2),(2,1)"
        bracket, closing, items = "", "", _split(text)
    if items is None or not all(items) or (len(items) < 2 and bracket != "{"):
        return None
    return Listing(bracket, closing, items)


def is_named(text: str) -> bool:
    r"""Whether ``text`` lists values of names: ``x = 1 \text{ or } x = 2``."""
    if text.count("=") < 2:
        return False
    listing = read_listing(text)
    return listing is not None and bool(_named(listing))


def compare_listings(answer: Listing, gold: Listing) -> bool | tuple[str, str]:
    """Whether they are the same; where only algebra can tell, the two texts that it is to compare."""
    brackets = {answer.bracket, gold.bracket}
    if "{" in brackets and brackets & {"(", "["}:
        return False
    if answer.bracket and gold.bracket and (answer.bracket, answer.closing) != (gold.bracket, gold.closing):
        return False
    if any(map(_DOTS.search, [*answer.items, *gold.items])):
        return answer.text, gold.text
    named, gold_named = _named(answer), _named(gold)
    is_ordered = bool(brackets & {"(", "["})
    if named and gold_named:
        names, gold_names = [name for name, _ in named], [name for name, _ in gold_named]
        if sorted(names) != sorted(gold_names):
            return False
        if len(set(names)) == len(names):  # one value for each name
            named, gold_named, is_ordered = sorted(named), sorted(gold_named), True
    elif named or gold_named:
        names = [name for name, _ in named or gold_named]
        if len(set(names)) > 1:  # read in the order in which they are written, as far as that is the tuple's
            if is_ordered and names != sorted(set(names)):
                return False
            is_ordered = True
    values = [value for _, value in named] if named else answer.items
    gold_values = [value for _, value in gold_named] if gold_named else gold.items
    return _compare_values(values, gold_values, is_ordered, is_set=brackets == {"{"})


def _compare_values(values: list[str], golds: list[str], is_ordered: bool, is_set: bool) -> bool | tuple[str, str]:
    answer, gold = Listing("(" if is_ordered else "", ")", values), Listing("(" if is_ordered else "", ")", golds)
    if not is_ordered and all(value.startswith("(") for value in values + golds):  # solutions, each once
        values, golds = list(dict.fromkeys(values)), list(dict.fromkeys(golds))
        answer, gold = Listing("", "", values), Listing("", "", golds)
    if is_set:
        answer, gold = Listing("{", "}", values), Listing("{", "}", golds)
    elif answer.num_values != gold.num_values:
        return False
    numbers, gold_numbers = [read_number(value) for value in values], [read_number(value) for value in golds]
    if None not in numbers + gold_numbers:
        same = (
            numbers == gold_numbers
            if is_ordered
            else set(numbers) == set(gold_numbers)
            if is_set
            else Counter(numbers) == Counter(gold_numbers)
        )
        if same or "." not in "".join(values + golds):
            return same
    elif is_ordered and all(map(same_spelling, values, golds)):
        return True
    elif is_ordered and any(map(differ, values, golds)):
        return False
    elif not is_ordered and Counter(map(tight, values)) == Counter(map(tight, golds)):
        return True
    return answer.text, gold.text


def _named(listing: Listing) -> list[tuple[str, str]]:
    """The (name, value) pairs, if every item has a name; else nothing."""
    pairs = [assigned(item) for item in listing.items]
    return [pair for pair in pairs if pair] if None not in pairs else []


def _split(text: str) -> list[str] | None:
    """At the commas outside of brackets; None if brackets do not match."""
    items, depth, start, position = [], 0, 0, 0
    while position < len(text):
        symbol = text[position]
        if symbol == "\\":
            symbol = text[position : position + 2]
            position += 1
        position += 1
        if symbol in ("(", "[", "{", r"\{"):
            depth += 1
        elif symbol in (")", "]", "}", r"\}"):
            depth -= 1
            if depth < 0:
                return None
        elif symbol == "," and depth == 0:
            items.append(text[start : position - 1])
            start = position
    return [*items, text[start:]] if depth == 0 else None
