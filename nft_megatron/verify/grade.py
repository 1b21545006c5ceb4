r"""Decides what exact comparison can decide. Pure functions, run in the caller's process: linear in an answer's length, and
whatever takes longer sees at most ``MAX_BOX_CHARS`` characters of answer and gold.

The strict route; the first rule that applies decides:

1. the engine aborted the answer: unknown. Cut at the token limit: wrong, as in the paper.
2. no closed box, one of more than ``MAX_BOX_CHARS`` characters, or an empty one: wrong. A gold of more cannot be met: unknown.
3. several different boxes side by side when the gold is one number: wrong.
4. what exact rules can tell of box and gold in plain spelling (:mod:`~nft_megatron.verify.comparison`): correct or wrong.
5. otherwise computer algebra must compare the box (not the text around it) with the gold: :class:`Undecided`.

The DAPO route never needs math-verify: the last "Answer:" line of the last ``DAPO_WINDOW`` characters, or if there is none the
last box there, must be the gold's text or number.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from nft_megatron.base.records import FinishReason, Verdict
from nft_megatron.verify.boxes import MAX_BOX_CHARS, gold_in_boxes, last_boxes, unboxed
from nft_megatron.verify.comparison import STRICT, Undecided, compare, read_gold_number, stated_part
from nft_megatron.verify.numbers import is_digits, read_bare_number, read_number
from nft_megatron.verify.reasons import verdict
from nft_megatron.verify.spelling import plain

DAPO = "dapo/3"
DAPO_WINDOW = 300

_ANSWER_LINE = re.compile(r"answer[^\w:]*+:[\s*]*+(.*+)", re.IGNORECASE)  # the answer may be on a line below
_SMALL_CACHE = 4096  # enough for the answers of a few groups
_EXACT, _ANOTHER = verdict("exact", STRICT), verdict("another number", STRICT)


def cut_off(finish_reason: FinishReason, verifier: str) -> Verdict | None:
    """The verdict on an answer that did not end by itself, whatever it says; None if it did."""
    if finish_reason == "length":
        return verdict("truncated", verifier)
    if finish_reason == "abort":
        return verdict("engine fault", verifier)
    return None


def grade(text: str, gold: str, finish_reason: FinishReason) -> Verdict | Undecided:
    r"""The verdict of the strict route, or what is left for math-verify.

    >>> grade(r"so the total is \boxed{1{,}234}.", "1234", "stop").label
    'correct'
    >>> grade(r"\boxed{2x = 34}", "34", "stop")
    Verdict(label='wrong', reason='not a number', verifier='strict/4', seconds=0.0)
    >>> grade(r"hence \boxed{\sqrt{2}/2}", r"\frac{1}{\sqrt{2}}", "stop")
    Undecided(text='\\boxed{\\sqrt{2}/2}', gold='\\frac{1}{\\sqrt{2}}', question='')
    """
    cut = cut_off(finish_reason, STRICT)
    if cut is not None:
        return cut
    boxes = last_boxes(text)
    if not boxes:
        return verdict("no closed box", STRICT)
    if boxes[-1].end - boxes[0].start > MAX_BOX_CHARS:
        return verdict("box too long", STRICT)
    contents = tuple(unboxed(box.content) for box in boxes)
    if not contents[-1]:
        return verdict("empty box", STRICT)
    gold = gold.rpartition("####")[2].strip()
    if len(contents) == 1 and is_digits(gold) and is_digits(contents[0]):  # on most data, nearly all that are right
        return _EXACT if contents[0].lstrip("0") == gold.lstrip("0") else _ANOTHER
    return _compare(contents, gold)


def grade_dapo(text: str, gold: str, finish_reason: FinishReason) -> Verdict:
    r"""The verdict of the DAPO route.

    >>> grade_dapo("so 30 + 4 = 34.\nAnswer: $34$", "34", "stop").label, grade_dapo(r"\boxed{34}", "34", "stop").label
    ('correct', 'correct')
    >>> grade_dapo(r"\boxed{34}, or rather" + "\nAnswer: 35", "34", "stop").reason
    'another number'
    """
    cut = cut_off(finish_reason, DAPO)
    if cut is not None:
        return cut
    end = text[-DAPO_WINDOW:]
    lines = _ANSWER_LINE.findall(end)
    boxes = last_boxes(lines[-1] if lines else end)
    answer = unboxed(boxes[-1].content) if boxes else lines[-1].strip(" *") if lines else ""
    if not answer:
        return verdict("empty box" if boxes else "no answer found", DAPO)
    return _compare_exactly(answer, gold.strip())


@functools.lru_cache(_SMALL_CACHE)
def _compare(contents: tuple[str, ...], gold: str) -> Verdict | Undecided:
    """Compare the boxes that together form the answer with the gold."""
    if len(gold) > MAX_BOX_CHARS:
        return verdict("unreadable gold", STRICT)
    if not is_digits(gold):
        gold = plain(gold_in_boxes(gold))
    contents = tuple(map(plain, contents))
    if len(contents) == 1:
        return compare(contents[0], gold)
    number = read_number(stated_part(contents[-1]))
    if all(content == contents[-1] or _is_number(content, number) for content in contents):
        return compare(contents[-1], gold)
    if read_gold_number(gold) is not None:
        return verdict("several answers", STRICT)
    return compare(", ".join(contents), gold)


@functools.lru_cache(_SMALL_CACHE)
def _compare_exactly(answer: str, gold: str) -> Verdict:
    if len(gold) > MAX_BOX_CHARS:
        return verdict("unreadable gold", DAPO)
    answer, gold = plain(answer), plain(gold)
    number, gold_number = read_number(stated_part(answer)), read_bare_number(gold)
    if "".join(answer.split()) == "".join(gold.split()) or (number is not None and number == gold_number):
        return verdict("exact", DAPO)
    return verdict("not equal" if None in (number, gold_number) else "another number", DAPO)


def _is_number(content: str, number: Fraction | None) -> bool:
    return number is not None and read_number(stated_part(content)) == number
