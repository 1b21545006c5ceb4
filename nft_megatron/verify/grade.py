r"""Reads the answer in the last ``\boxed{}`` and decides what can be decided by exact comparison. Pure.

The strict route, in order (the first that applies decides):

1. the engine was interrupted: unknown. Cut at the token limit: wrong, as in the paper.
2. no closed box, an empty one, or one of more than ``MAX_BOX_CHARS`` characters: wrong.
3. several different boxes side by side where the gold is one number: wrong.
4. box and gold are the same text or the same number: correct.
5. the gold is an integer, and the box another number or anything but plain arithmetic: wrong.
6. else math-verify must compare the box (not the text around it) with the gold: :class:`Undecided`.

Steps 3 and 5 are stricter than math-verify, which accepts ``34\%``, ``1=34`` and ``n \approx 34`` for 34.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from nft_megatron.records import FinishReason, Verdict
from nft_megatron.verify.numbers import is_arithmetic, read_bare_number, read_number, stated_part

STRICT = "strict/1"
MAX_BOX_CHARS = 1000

# A box, an escaped backslash or brace, a brace. Models write "\\boxed" where they quote code.
_TOKEN = re.compile(r"\\{1,2}(?:boxed|fbox|framebox)\s*\{|\\[\\{}]|[{}]")
_FIRST_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
# What may stand between two boxes that together are one answer: "$\boxed{3}$ and $\boxed{4}$".
_JOINT = re.compile(r"(?:[\s$,;&*.]|\\[()\[\],;! ]|\\q?quad|and|or|\\(?:text|mbox|mathrm)\s*\{\s*,?\s*(?:and|or)?\s*,?\s*\})*")


@dataclass(frozen=True)
class Box:
    r"""``\boxed{content}`` at ``text[start:end]``."""

    content: str
    start: int
    end: int


@dataclass(frozen=True)
class Undecided:
    """Nothing but computer algebra tells whether ``answer``, LaTeX from inside the box, equals ``gold``."""

    answer: str
    gold: str


def closed_boxes(text: str) -> list[Box]:
    r"""All closed, outermost boxes of ``text``, in order; braces balance, escaped ones do not count. One pass.

    >>> [box.content for box in closed_boxes(r"\boxed{1}, \fbox{\frac{1}{2}}, \boxed {\{3\}}, \boxed{4")]
    ['1', '\\frac{1}{2}', '\\{3\\}']
    """
    first = _FIRST_BOX.search(text)
    boxes: list[Box] = []
    open_braces: list[tuple[bool, int, int]] = []
    for token in _TOKEN.finditer(text, first.start()) if first else ():
        symbol = token.group()
        if symbol == "}":
            if not open_braces:
                continue
            is_box, start, inside = open_braces.pop()
            if is_box:
                while boxes and boxes[-1].start > start:
                    boxes.pop()
                boxes.append(Box(text[inside : token.start()], start, token.end()))
        elif symbol.endswith("{") and symbol != r"\{":
            open_braces.append((symbol != "{", token.start(), token.end()))
    return boxes


def last_boxes(text: str) -> list[Box]:
    """The last closed box of ``text`` and those that stand directly before it, joined by nothing but punctuation, and, or."""
    boxes = closed_boxes(text)
    first = len(boxes) - 1
    while first > 0 and _JOINT.fullmatch(text, boxes[first - 1].end, boxes[first].start):
        first -= 1
    return boxes[max(first, 0) :]


def cut_off(finish_reason: FinishReason, verifier: str) -> Verdict | None:
    """The verdict on an answer that did not end by itself, whatever it says; None where it did."""
    if finish_reason == "length":
        return Verdict("wrong", "truncated", verifier)
    if finish_reason == "abort":
        return Verdict("unknown", "engine fault", verifier)
    return None


def grade(text: str, gold: str, finish_reason: FinishReason) -> Verdict | Undecided:
    r"""The verdict of the strict route, or what is left for math-verify.

    >>> grade(r"so the total is \boxed{1{,}234}.", "1234", "stop").label
    'correct'
    >>> grade(r"\boxed{34\%}", "34", "stop")
    Verdict(label='wrong', reason='not a number', verifier='strict/1', seconds=0.0)
    >>> grade(r"\boxed{\sqrt{2}/2}", r"\frac{1}{\sqrt{2}}", "stop")
    Undecided(answer='\\sqrt{2}/2', gold='\\frac{1}{\\sqrt{2}}')
    """
    cut = cut_off(finish_reason, STRICT)
    if cut is not None:
        return cut
    boxes = last_boxes(text)
    if not boxes:
        return _wrong("no closed box")
    contents = [_unwrapped(box.content) for box in boxes]
    if not contents[-1]:
        return _wrong("empty box")
    if boxes[-1].end - boxes[0].start > MAX_BOX_CHARS:
        return _wrong("box too long")
    return _compare(contents, gold.strip())


def _compare(contents: list[str], gold: str) -> Verdict | Undecided:
    """Compare the boxes that together are the answer with the gold."""
    answer, gold_number = stated_part(contents[-1]), read_bare_number(gold)
    number = read_number(answer)
    if not all(content == contents[-1] or _is_number(content, number) for content in contents):
        return _wrong("several answers") if gold_number is not None else Undecided(", ".join(contents), gold)
    if contents[-1] == gold or (number is not None and number == gold_number):
        return Verdict("correct", "exact", STRICT)
    if gold_number is not None and gold_number.denominator == 1:
        if number is not None:
            return _wrong("another number")
        if not is_arithmetic(answer):
            return _wrong("not a number")
    return Undecided(answer, gold)


def _is_number(content: str, number: Fraction | None) -> bool:
    return number is not None and read_number(stated_part(content)) == number


def _unwrapped(content: str) -> str:
    """The content of a box that holds nothing but another box, any number of times."""
    content = content.strip()
    while (inner := closed_boxes(content)) and (inner[0].start, inner[0].end) == (0, len(content)):
        content = inner[0].content.strip()
    return content


def _wrong(reason: str) -> Verdict:
    return Verdict("wrong", reason, STRICT)
