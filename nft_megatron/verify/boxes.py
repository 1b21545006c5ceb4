r"""Finds the ``\boxed{}`` that holds the answer. Pure functions, linear in the length of the text."""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_BOX_CHARS = 1000

# A box, an escaped backslash or brace, or a brace. Models write "\\boxed" when they quote code.
_TOKEN = re.compile(r"\\{1,2}(?:boxed|fbox|framebox)\s*\{|\\[\\{}]|[{}]")
_OPENING = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
# "\boxed 5": a number or a letter without braces, at the end of a formula or of a sentence.
_WITHOUT_BRACES = re.compile(
    r"\\(?:boxed|fbox)(?![A-Za-z])\s*+([-+]?+(?:[0-9]++(?:[.,][0-9]++)*+|\.[0-9]++|[A-Za-z](?![A-Za-z])))(?=\s*+(?:$|[$\n]|\\[)\]])|[.,;)])"
)
# What may stand between two boxes that together form one answer: "$\boxed{3}$ and $\boxed{4}$", "$x=\boxed{3}$, $y=\boxed{4}$".
_NAME = r"([A-Za-z](?:_(?:[0-9A-Za-z]|\{[0-9A-Za-z]*+\}))?+|\\[a-z]++)\s*+=\s*+"
_JOINT = re.compile(
    r"(?:[\s$,;&*.]|\\[()\[\],;! ]|\\q?quad|and|or|\\(?:text|mbox|mathrm)\s*+\{[\s,]*+(?:(?:and|or)[\s,]*+)?+\})*+"
    + f"(?:{_NAME})?+"
)
_NAMED = re.compile(rf"(?<![A-Za-z0-9\\+*/^_(){{}}=-]){_NAME}$")
_NAME_CHARS = 30
# A box that only quotes the task: "(boxed as asked, in \boxed{})".
_PLACEHOLDERS = ("", "...", "…", r"\ldots", r"\dots", r"\cdots", r"\cdot")
_QUOTING = re.compile(r"(?<![A-Za-z])(?:in|into|inside|within|using|with|via)(?:\s++(?:an?|the))?+[\s`$\"'(]*+$", re.IGNORECASE)
_MAX_QUOTES = 8


class Box(NamedTuple):
    r"""``\boxed{content}`` at ``text[start:end]``."""

    content: str
    start: int
    end: int


def closed_boxes(text: str, start: int = 0) -> list[Box]:
    r"""All closed, outermost boxes that open in ``text[start:]``, in order; braces must balance, escaped ones do not count.

    >>> [box.content for box in closed_boxes(r"\boxed{1}, \fbox{\frac{1}{2}}, \boxed {\{3\}}, \boxed{4")]
    ['1', '\\frac{1}{2}', '\\{3\\}']
    """
    word = text.find("box", start)
    first = _OPENING.search(text, max(word - len(r"\frame"), start)) if word >= 0 else None
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
    r"""The last box of ``text`` and those directly before it, joined only by punctuation, names, "and" or "or".

    Long answers are read from the end: a box that opens more than ``2 * MAX_BOX_CHARS`` before the last one plays no part.
    Nothing counts after a ``<think>`` that is never closed, nor an empty box that quotes the task after the answer's own.

    >>> [box.content for box in last_boxes(r"so $x=\boxed{3}$ and $y=\boxed{5}$, as asked in \boxed{}.")]
    ['x=3', 'y=5']
    """
    if (thinking := text.rfind("<think>")) >= 0 and text.find("</think>", thinking) < 0:
        text = text[:thinking]
    boxes = _last_group(text)
    for _ in range(_MAX_QUOTES):
        if not boxes or boxes[-1].content.strip() not in _PLACEHOLDERS:
            break
        start = boxes[-1].start
        if not _QUOTING.search(text, max(start - _NAME_CHARS, 0), start):
            break
        text = text[:start]
        boxes = _last_group(text) or boxes
    return boxes


def gold_in_boxes(text: str) -> str:
    r"""What the boxes of a gold hold, as a list if its last sentence has several; ``text`` itself if it has none.

    >>> gold_in_boxes(r"We need \boxed{1} sheet and \boxed{2} bins."), gold_in_boxes(r"x \in \boxed{[0,1)}.")
    ('1, 2', '[0,1)')
    """
    boxes = last_boxes(text) if "box" in text else []
    if not boxes:
        return text
    for box in reversed(closed_boxes(text)):
        if box.end <= boxes[0].start and _lists(text[box.end : boxes[0].start]):
            boxes.insert(0, box)
    return ", ".join(unboxed(box.content) for box in boxes)


def _lists(words: str) -> bool:
    """Whether ``words`` stand between two items of one list, as in "1 sheet of paper and 2 bins"."""
    return len(words) <= _NAME_CHARS and words.rstrip(" $").endswith((" and", " or", ",")) and not set(words) & set(".:;!?=\n")


def _last_group(text: str) -> list[Box]:
    boxes = _closed_group(text)
    tail = max(boxes[-1].end if boxes else 0, len(text) - 2 * MAX_BOX_CHARS)
    for bare in _WITHOUT_BRACES.finditer(text, tail) if text.find("box", tail) >= 0 else ():
        boxes = [Box(bare[1], bare.start(), bare.end())]
    if len(boxes) < 2:
        return boxes
    first = len(boxes) - 1
    names: list[str] = []
    while first > 0 and (joint := _JOINT.fullmatch(text, boxes[first - 1].end, boxes[first].start)):
        if joint[1]:
            names.insert(0, joint[1])
        elif names:
            break
        first -= 1
    group = boxes[first:]
    if not names:
        return group
    opening_name = _NAMED.search(text, max(group[0].start - _NAME_CHARS, 0), group[0].start)
    if opening_name is None or len(names) != len(group) - 1:
        return group[-1:]
    return [
        Box(f"{name}={box.content}", box.start, box.end) for name, box in zip([opening_name[1], *names], group, strict=True)
    ]


def _closed_group(text: str) -> list[Box]:
    """The closed boxes near the last one; the usual one, alone and without braces inside, is found at once."""
    opening = _last_opening(text)
    if opening is None:
        return []
    begin, inside = opening.span()
    start, end = max(begin - 2 * MAX_BOX_CHARS, 0), text.find("}", inside)
    content = text[inside:end]
    if end >= 0 and "{" not in content and not content.endswith("\\") and text.find("box", start, begin) < 0:
        return [Box(content, begin, end + 1)]
    return closed_boxes(text, start) or closed_boxes(text)


def unboxed(content: str) -> str:
    r"""The content of a box without the boxes in it.

    >>> unboxed(r" \boxed{\fbox{34}} "), unboxed(r"x = \boxed{3}")
    ('34', 'x = 3')
    """
    content = content.strip()
    while "box" in content and (inner := closed_boxes(content)):
        last = inner[-1]
        content = (content[: last.start] + last.content + content[last.end :]).strip()
    return content


def _last_opening(text: str) -> re.Match[str] | None:
    """Where the last box opens, closed or not."""
    word = len(text)
    while (word := text.rfind("box", 0, word)) >= 0:
        backslash = text.rfind("\\", max(word - len(r"\frame"), 0), word)
        if backslash >= 0 and (opening := _OPENING.match(text, backslash)):
            return opening
    return None
