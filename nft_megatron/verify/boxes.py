r"""Finds the ``\boxed{}`` that holds the answer. Pure functions, linear in the length of the text."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_BOX_CHARS = 1000

# A box, an escaped backslash or brace, or a brace. Models write "\\boxed" when they quote code.
_TOKEN = re.compile(r"\\{1,2}(?:boxed|fbox|framebox)\s*\{|\\[\\{}]|[{}]")
_OPENING = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
# What may stand between two boxes that together form one answer: "$\boxed{3}$ and $\boxed{4}$".
_JOINT = re.compile(r"(?:[\s$,;&*.]|\\[()\[\],;! ]|\\q?quad|and|or|\\(?:text|mbox|mathrm)\s*\{\s*,?\s*(?:and|or)?\s*,?\s*\})*")


@dataclass(frozen=True)
class Box:
    r"""``\boxed{content}`` at ``text[start:end]``."""

    content: str
    start: int
    end: int


def closed_boxes(text: str, start: int = 0) -> list[Box]:
    r"""All closed, outermost boxes that open in ``text[start:]``, in order; braces must balance, escaped ones do not count.

    >>> [box.content for box in closed_boxes(r"\boxed{1}, \fbox{\frac{1}{2}}, \boxed {\{3\}}, \boxed{4")]
    ['1', '\\frac{1}{2}', '\\{3\\}']
    """
    first = _OPENING.search(text, start)
    boxes: list[Box] = []
    open_braces: list[tuple[bool, int, int]] = []
    for token in _TOKEN.finditer(text, first.start()) if first else ():
        symbol = token.group()
        if symbol == "}":
            if not open_braces:
                continue
            is_box, begin, inside = open_braces.pop()
            if is_box:
                while boxes and boxes[-1].start > begin:
                    boxes.pop()
                boxes.append(Box(text[inside : token.start()], begin, token.end()))
        elif symbol.endswith("{") and symbol != r"\{":
            open_braces.append((symbol != "{", token.start(), token.end()))
    return boxes


def last_boxes(text: str) -> list[Box]:
    """The last closed box of ``text`` and those directly before it, joined only by punctuation, "and" or "or".

    Long answers are read from the end: a box that opens more than ``2 * MAX_BOX_CHARS`` before the last one plays no part.
    """
    opening = _last_opening(text)
    if opening < 0:
        return []
    boxes = closed_boxes(text, max(opening - 2 * MAX_BOX_CHARS, 0)) or closed_boxes(text)
    first = len(boxes) - 1
    while first > 0 and _JOINT.fullmatch(text, boxes[first - 1].end, boxes[first].start):
        first -= 1
    return boxes[max(first, 0) :]


def unboxed(content: str) -> str:
    r"""The content of a box, with any number of boxes that hold nothing but another box removed.

    >>> unboxed(r" \boxed{\fbox{34}} "), unboxed(r"\boxed{3} or 4")
    ('34', '\\boxed{3} or 4')
    """
    content = content.strip()
    while (inner := closed_boxes(content)) and (inner[0].start, inner[0].end) == (0, len(content)):
        content = inner[0].content.strip()
    return content


def _last_opening(text: str) -> int:
    """Where the last box opens, closed or not; -1 if there is none."""
    word = len(text)
    while (word := text.rfind("box", 0, word)) >= 0:
        backslash = text.rfind("\\", max(word - len(r"\frame"), 0), word)
        if backslash >= 0 and _OPENING.match(text, backslash):
            return backslash
    return -1
