"""Every regular expression of the package takes time in proportion to the text; tests/regexes.py says how that is judged."""

import re

import pytest
from regexes import Call, calls, compiled_patterns, growth

from nft_megatron.base.records import Verdict
from nft_megatron.data.wording import bare, worded
from nft_megatron.verify import boxes, numbers
from nft_megatron.verify.boxes import MAX_BOX_CHARS
from nft_megatron.verify.comparison import Undecided
from nft_megatron.verify.grade import grade, grade_dapo

SHORT = {numbers._GOES_ON.pattern: numbers._MAX_RECURRING}
"""Polynomial patterns, because of their back references, and the characters that they see at most."""
BUILT_WHEN_CALLED = {"data/files.py"}
"""Patterns made of names that another pattern has matched."""


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        (r"(a*)*b", "exponential"),
        (r"(?:a+)+", "exponential"),
        (r"(a|a)*b", "exponential"),
        (r"(a|ab|b)*c", "exponential"),
        (r"(\w+\s?)*$", "exponential"),
        (r"(?:x(?:a|a)*y)?z", "exponential"),
        (r"(?:(?:a*a*b))*+", "polynomial"),
        (r"(?=(a|a)*b)", "exponential"),
        (r"a*a*b", "polynomial"),
        (r"\s*,?\s*x", "polynomial"),
        (r"(.*)\.(.*)x", "polynomial"),
        (r"[a-z]*[A-Z]*x", "linear"),
        (r"(?i:[a-z])*[A-Z]*x", "linear"),
        (r"\s*+\s*b", "linear"),
        (r"(?>a*)a*b", "linear"),
        (r"(?:[a-z]++\s*+)*+$", "linear"),
        (r"[0-9]+(?:,[0-9]+)*", "linear"),
        (r"\s*,\s*x", "linear"),
        (r"(?:a|b)*(?!c)\d+", "linear"),
    ],
)
def test_the_judgement(pattern: str, kind: str):
    assert growth(pattern).kind == kind


def test_case_is_ignored_where_the_pattern_says_so():
    assert growth("[a-z]*[A-Z]*x", re.IGNORECASE).kind == "polynomial"
    assert growth("[a-z]*[A-Z]*x").kind == "linear"


def test_every_compiled_pattern_is_linear():
    patterns = compiled_patterns()
    assert len(patterns) > 100
    judged = {name: growth(pattern.pattern, pattern.flags & ~re.UNICODE) for name, pattern in patterns.items()}
    odd = {name: result for name, result in judged.items() if result.kind not in ("linear", allowed(patterns[name].pattern))}
    assert odd == {}


def allowed(pattern: str) -> str:
    return "polynomial" if pattern in SHORT else "linear"


def test_every_pattern_given_to_a_function_of_re_is_linear():
    found = calls()
    assert len(found) > 100
    literal = {call: growth(call.pattern).kind for call in found if call.pattern is not None}
    assert {call.where: kind for call, kind in literal.items() if kind not in ("linear", allowed(call.pattern))} == {}


def test_polynomial_patterns_see_short_texts_only():
    assert max(SHORT.values()) <= 100
    assert numbers.read_number("0." + "1" * 200 + "...") is None


def test_no_pattern_escapes_the_judgement():
    """What is not literal is made when its module is imported, so that the module holds it."""
    later = [call for call in calls() if call.pattern is None and not call.at_import]
    assert {call.where.partition(":")[0] for call in later} == BUILT_WHEN_CALLED
    assert all(isinstance(call, Call) for call in later)


@pytest.mark.parametrize("text", ["a" * 40, "", "Solve"])
def test_a_question_in_no_wording_is_unchanged(text: str):
    assert bare(text) == text


def test_a_question_of_spaces_does_not_need_a_cubic_search():
    opening = worded("?", "answer").partition("?")[0]
    text = opening + " " * 100_000
    assert bare(text) == text
    assert bare(f" {opening}  a b\n c \n{worded('?', 'boxed').rpartition('?')[2]}\n ") == "a b\n c"


def test_boxes_within_boxes_are_not_unpacked_one_by_one(monkeypatch: pytest.MonkeyPatch):
    """Each would be a pass over all of them."""
    passes = []
    real = boxes.closed_boxes
    monkeypatch.setattr(boxes, "closed_boxes", lambda *arguments: passes.append(1) or real(*arguments))
    depth = 5000
    text = r"\boxed{" * depth + "34" + "}" * depth
    assert grade(text, "34", "stop").reason == "box too long"
    assert len(passes) <= 2
    assert grade(r"\boxed{" * 100 + "34" + "}" * 100, "34", "stop").reason == "exact"


@pytest.mark.parametrize("text", ["²", "①", "5²"])
def test_digits_that_are_no_decimal_digits_crash_nothing(text: str):
    assert isinstance(grade(rf"\boxed{{{text}}}", "34", "stop"), Verdict | Undecided)
    assert isinstance(grade(r"\boxed{34}", text, "stop"), Verdict | Undecided)
    assert isinstance(grade_dapo(f"Answer: {text}", text, "stop"), Verdict)


@pytest.mark.parametrize("gold", ["9" * 1_000_000, "(" * 5000, r"\boxed{" * 400 + "}" * 400])
def test_a_gold_that_no_box_can_hold_is_unreadable(gold: str):
    assert len(gold) > MAX_BOX_CHARS
    assert grade(r"\boxed{34}", gold, "stop").reason == "unreadable gold"
    assert grade_dapo("Answer: 34", gold, "stop").reason == "unreadable gold"
