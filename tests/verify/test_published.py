r"""The graders of the authors' code against their description.

The text of the last \boxed{} in the last 100 characters, or the "Answer:" line after Minerva's normalisation.
"""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nft_megatron.config.sections import VerifyConfig
from nft_megatron.verify.modes import MODES, check_for_training
from nft_megatron.verify.published import grade_answer, grade_boxed, normalise
from nft_megatron.verify.service import Verifier


@pytest.mark.parametrize(
    ("text", "gold", "label"),
    [
        (r"so \boxed{34}.", "34", "correct"),
        (r"\boxed{35}, no: \boxed{34}", "34", "correct"),
        (r"\boxed{34}, no: \boxed{35}", "34", "wrong"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", "correct"),
        # texts, not values
        (r"\boxed{34.0}", "34", "wrong"),
        (r"\boxed{ 34}", "34", "wrong"),
        (r"\boxed{034}", "34", "wrong"),
        (r"\boxed{1{,}234}", "1234", "wrong"),
        (r"\boxed{34", "34", "wrong"),
        (r"\fbox{34}", "34", "wrong"),
        (r"\boxed {34}", "34", "wrong"),
        ("the answer is 34", "34", "wrong"),
        ("", "34", "wrong"),
        # the last opening counts, within or beside another, closed or not
        (r"\boxed{\boxed{34}}", "34", "correct"),
        (r"\boxed{34} \boxed{", "34", "wrong"),
        (r"\boxed{\{34\}}", r"\{34\}", "correct"),  # escaped braces are counted like others, and balance
        (r"\boxed{34\}}", r"34\}", "wrong"),
        # the last 100 characters: the whole opening must be among them
        (r"\boxed{34}" + "." * 90, "34", "correct"),
        (r"\boxed{34}" + "." * 91, "34", "wrong"),
        (r"\boxed{" + "1" * 93, "1" * 93, "wrong"),
    ],
)
def test_the_box_is_compared_as_a_text(text: str, gold: str, label: str):
    assert grade_boxed(text, gold, "stop").label == label


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "34", " "]), max_size=30), st.sampled_from(["34", "{34}", ""]))
def test_the_box_is_found_as_by_a_count_of_braces(parts: list[str], gold: str):
    """From the last opening on, the first place at which as many braces have closed as opened."""
    text = "".join(parts)
    window = text[-100:]
    start = window.rfind(r"\boxed{")
    ends = [
        end
        for end in range(start + 1, len(window) + 1)
        if start >= 0 and window[end - 1] == "}" and window.count("{", start, end) == window.count("}", start, end)
    ]
    expected = bool(ends) and window[start + len(r"\boxed{") : ends[0] - 1] == gold
    assert (grade_boxed(text, gold, "stop").label == "correct") == expected


@pytest.mark.parametrize(
    ("text", "gold", "label"),
    [
        ("Answer: 34", "34", "correct"),
        ("Answer: 34\nso it is", "34", "correct"),
        ("answer : $34$.", "34", "correct"),
        ("Answer: $x = 34$", "34", "correct"),
        ("Answer: 1,234 dollars", "1234", "correct"),
        ("Answer:\n34", "34", "correct"),
        ("Answer: 35\nAnswer: 34", "34", "correct"),
        ("Answer: 34\nAnswer: 35", "34", "wrong"),
        ("Answer: 34\nAnswer: \n", "34", "wrong"),  # the last line says nothing
        ("Answer: 34.0", "34", "wrong"),
        (r"\boxed{34}", "34", "wrong"),
        (r"Answer: $\boxed{34}$", "34", "correct"),
        ("Answer: 34" + "\n" * 290, "34", "correct"),
        ("Answer: 34" + "\n" * 291, "34", "wrong"),
        ("Answer: 34 = 35", "34", "wrong"),
        (r"Answer: \frac12", r"\frac{1}{2}", "correct"),
        (r"Answer: \sqrt3 cm", r"\sqrt{3}", "correct"),
        (r"Answer: 90^\circ", "90", "correct"),
        (r"Answer: \text{5 and }6", "5 and 6", "correct"),
    ],
)
def test_the_answer_line_is_compared_after_normalisation(text: str, gold: str, label: str):
    assert grade_answer(text, gold, "stop").label == label


@given(st.text(st.sampled_from("$x3"), max_size=12))
def test_what_stands_between_the_first_two_dollars_is_the_formula(text: str):
    found = re.match(r"[^$]*\$([^$]*)\$", text)
    assert normalise(text) == (found[1] if found else text.replace("$", ""))


@pytest.mark.parametrize(("mode", "text"), [("published-boxed", r"\boxed{34} and"), ("published-answer", "Answer: 34\nand")])
def test_there_is_no_rule_for_truncation(mode: str, text: str):
    with Verifier(VerifyConfig.model_validate({"mode": mode})) as verifier:
        cut, aborted = verifier.verify_many([(text, "34", "length"), (text, "34", "abort")])
    assert (cut.label, cut.verifier) == ("correct", MODES[mode].version)
    assert (aborted.label, aborted.reason) == ("unknown", "engine fault")
    check_for_training(mode)
