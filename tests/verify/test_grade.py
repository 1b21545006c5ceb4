"""The strict route against verdicts written by hand."""

import itertools
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nft_megatron.verify.boxes import MAX_BOX_CHARS, closed_boxes, last_boxes
from nft_megatron.verify.grade import DAPO_WINDOW, Undecided, grade, grade_dapo
from nft_megatron.verify.numbers import read_bare_number, read_number

RIGHT = [
    # (answer text, gold)
    (r"\boxed{34}", "34"),
    (r"so $m+n=\boxed{34}$.", "34"),
    (r"\boxed {34}", "34"),
    (r"\boxed  {34}", "34"),
    (r"\fbox{34}", "34"),
    (r"\framebox{34}", "34"),
    (r"in a string: \\boxed{34}", "34"),
    (r"new line\\\boxed{34}", "34"),
    (r"\boxed{ 34 }", "34"),
    ("\\boxed{\n34\n}", "34"),
    (r"\boxed{$34$}", "34"),
    (r"\boxed{\(34\)}", "34"),
    (r"\boxed{34.}", "34"),
    (r"\boxed{34.0}", "34"),
    (r"\boxed{034}", "34"),
    (r"\boxed{34}", "034"),
    (r"\boxed{27}", "27.0"),
    (r"\boxed{+34}", "34"),
    (r"\boxed{-34}", "-34"),
    (r"\boxed{−34}", "-34"),
    (r"\boxed{- 34}", "-34"),
    (r"\boxed{{34}}", "34"),
    (r"\boxed{(34)}", "34"),
    (r"\boxed{\left(34\right)}", "34"),
    (r"\boxed{\text{34}}", "34"),
    (r"\boxed{\mathbf{34}}", "34"),
    (r"\boxed{\textbf{(719) }}", "719"),
    (r"\boxed{\textbf{(051) }}", "051"),
    (r"\boxed{\boxed{34}}", "34"),
    (r"\boxed{12,345}", "12345"),
    (r"\boxed{12{,}345}", "12345"),
    (r"\boxed{12\,345}", "12345"),
    (r"\boxed{12 345}", "12345"),
    (r"\boxed{12\!,345}", "12345"),
    (r"\boxed{11,\! 111,\! 111,\! 100}", "11111111100"),
    (r"\boxed{10000}", "10{,}000"),
    (r"\boxed{1,234,567.00}", "1234567"),
    (r"\boxed{\frac{68}{2}}", "34"),
    (r"\boxed{\dfrac{68}{2}}", "34"),
    (r"\boxed{\frac82}", "4"),
    (r"\boxed{-\frac{68}{2}}", "-34"),
    (r"\boxed{\frac{-68}{2}}", "-34"),
    (r"\boxed{68/2}", "34"),
    (r"\boxed{n = 34}", "34"),
    (r"\boxed{m+n=34}", "34"),
    (r"\boxed{f(1, 2) = 34}", "34"),
    (r"\boxed{\angle ABC = 34^\circ}", "34"),
    (r"\boxed{|S| = 34}", "34"),
    (r"\boxed{\text{Total} = 34}", "34"),
    (r"\boxed{m+n = 30+4 = 34}", "34"),
    (r"\boxed{r = 4 \text{ cm}}", "4"),
    (r"\boxed{34^\circ}", "34"),
    (r"\boxed{34^{\circ}}", "34"),
    (r"\boxed{34°}", "34"),
    (r"\boxed{34 \text{ cm}}", "34"),
    (r"\boxed{15\mbox{ cm}^2}", "15"),
    (r"\boxed{34\text{ ways}}", "34"),
    (r"\boxed{34 \mathrm{~km/h}}", "34"),
    (r"\boxed{34 cm}", "34"),
    (r"\boxed{30 degrees}", "30"),
    (r"\boxed{\$78}", "78"),
    (r"\boxed{33} is wrong. It is \boxed{34}", "34"),
    (r"So \boxed{34}.\n\n**Final Answer**\n\boxed{34}", "34"),
    (r"$\boxed{34}$ and $\boxed{34.0}$", "34"),
    (r"{ an open brace, then \boxed{34}", "34"),
    (r"} a closing one, then \boxed{34}", "34"),
    (r"\boxed{34} and an unclosed \boxed{35", "34"),
    (r"\boxed{3 \boxed{34}", "34"),
    (r"\boxed{34\%}", "34"),
    (r"\boxed{34 \text{ percent}}", "34"),
    (r"\boxed{34 \%}", "34"),
    (r"\boxed{３４}", "34"),
    (r"\boxed{2^{10}}", "1024"),
    (r"\boxed{x = 2^{10}}", "1024"),
    (r"\boxed{4!}", "24"),
    (r"\boxed{\binom{5}{2}}", "10"),
    (r"\boxed{0.333333}", r"\frac{1}{3}"),
    (r"\boxed{1\frac12}", r"\frac32"),
    (r"$\boxed{1}$, $\boxed{2}$ and $\boxed{3}$", r"\{1,2,3\}"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{0.5}", r"\frac12"),
    (r"\boxed{x^2+1}", "x^2+1"),
    (r"\boxed{x^2 + 1}", "x^2+1"),
    (r"\boxed{\left(3,\, \dfrac{\pi}{2}\right)}", r"(3,\frac{\pi}{2})"),
]

WRONG = [
    (r"\boxed{35}", "34"),
    (r"\boxed{-34}", "34"),
    (r"\boxed{34.4}", "34"),
    (r"\boxed{33.9999999999}", "34"),
    (r"34", "34"),
    (r"The answer is $34$.", "34"),
    (r"The answer is $34$ but \boxed{}", "34"),
    (r"\boxed{\boxed{34}} \boxed{}", "34"),
    (r"\boxed{34", "34"),
    (r"\boxed{34\}", "34"),
    (r"\boxed{34} no, \boxed{35}", "34"),
    (r"\boxed{35}, \boxed{34}", "34"),
    (r"$\boxed{35}$ and $\boxed{34}$", "34"),
    (r"\boxed{34} \boxed{35} \boxed{34}", "34"),
    (r"\boxed{1=34}", "34"),
    (r"\boxed{x = 3 = 34}", "34"),
    (r"\boxed{34 \approx 34.2}", "34"),
    (r"\boxed{\approx 99}", "99"),
    (r"\boxed{n \approx 99}", "99"),
    (r"\boxed{n \le 34}", "34"),
    (r"\boxed{n \geq 34}", "34"),
    (r"\boxed{n \neq 34}", "34"),
    (r"\boxed{n > 34}", "34"),
    (r"\boxed{n <= 34}", "34"),
    (r"\boxed{x \ne y = 34}", "34"),
    (r"\boxed{\pm 34}", "34"),
    (r"\boxed{34 \text{ or } 35}", "34"),
    (r"\boxed{x = 35 \text{ or } x = 34}", "34"),
    (r"\boxed{x = 2, y = 34}", "34"),
    (r"\boxed{34, 35}", "34"),
    (r"\boxed{1, 234}", "1234"),
    (r"\boxed{12,34}", "1234"),
    (r"\boxed{0,345}", "345"),
    (r"\boxed{3 4}", "34"),
    (r"\boxed{3 \quad 4}", "34"),
    (r"\boxed{\{34\}}", "34"),
    (r"\boxed{[34, 35]}", "34"),
    (r"\boxed{(34, 35)}", "34"),
    (r"\boxed{40_9}", "40"),
    (r"\boxed{n}", "34"),
    (r"\boxed{34n}", "34"),
    (r"\boxed{34m}", "34"),
    (r"\boxed{34i}", "34"),
    (r"\boxed{34\text{i}}", "34"),
    (r"\boxed{34\mathrm{e}}", "34"),
    (r"\boxed{34 \pi}", "34"),
    (r"\boxed{5 \text{ million}}", "5"),
    (r"\boxed{34 \text{ or more}}", "34"),
    (r"\boxed{\text{thirty-four}}", "34"),
    (r"\boxed{\text{Evelyn}}", "34"),
    (r"\boxed{9⁹}", "99"),
    (r"\boxed{" + "7" * 5000 + "}", "34"),
    (r"\boxed{\frac13}, \boxed{\frac12}", r"\frac12"),
    (r"\boxed{\frac13}", r"\frac12"),
    (r"\boxed{3}", r"\frac12"),
    (r"\boxed{\frac{1}{3}}", "0.33"),
    (r"\boxed{2^{10}}", "1023"),
]

UNDECIDED = [
    # (answer text, gold, what math-verify is to compare)
    (r"\boxed{\sqrt{1156}}", "34", r"\sqrt{1156}"),
    (r"\boxed{x = \sqrt{1156}}", "34", r"\sqrt{1156}"),
    (r"\boxed{2 \cdot 3(4)}", "24", r"2 \cdot 3(4)"),
    (r"\boxed{\frac{34}{0}}", "34", r"\frac{34}{0}"),
    (r"\boxed{a b}", "ab", "a b"),
    (r"\boxed{1\frac52}", r"\frac72", r"1\frac52"),
    (r"\fbox{1+x^2}", "x^2+1", "1+x^2"),
    (r"$\boxed{x}$, $\boxed{2x}$ and $\boxed{3}$", "x, x+x, 3", "x, 2x, 3"),
]


@pytest.mark.parametrize(("text", "gold"), RIGHT)
def test_right(text: str, gold: str) -> None:
    verdict = grade(text, gold, "stop")
    assert not isinstance(verdict, Undecided)
    assert verdict.label == "correct", verdict.reason


@pytest.mark.parametrize(("text", "gold"), WRONG)
def test_wrong(text: str, gold: str) -> None:
    verdict = grade(text, gold, "stop")
    assert not isinstance(verdict, Undecided)
    assert verdict.label == "wrong"


@pytest.mark.parametrize(("text", "gold", "answer"), UNDECIDED)
def test_left_to_math_verify(text: str, gold: str, answer: str) -> None:
    assert grade(text, gold, "stop") == Undecided(rf"\boxed{{{answer}}}", gold)


def test_reasons_and_version() -> None:
    assert grade(r"\boxed{34}", "34", "length").reason == "truncated"
    assert grade(r"\boxed{34}", "34", "length").label == "wrong"
    assert grade(r"\boxed{34}", "34", "abort").label == "unknown"
    assert grade("34", "34", "stop").reason == "no closed box"
    assert grade(r"\boxed{ }", "34", "stop").reason == "empty box"
    assert grade(rf"\boxed{{{'x' * MAX_BOX_CHARS}}}", "x", "stop").reason == "box too long"
    assert grade(r"\boxed{1},\boxed{2}", "2", "stop").reason == "several answers"
    assert grade(r"\boxed{1}", "2", "stop").reason == "another number"
    assert grade(r"\boxed{x}", "2", "stop").reason == "not a number"
    assert grade(r"\boxed{2}", "2", "stop").verifier == "strict/4"


@given(st.integers(-(10**12), 10**12), st.booleans())
def test_every_spelling_of_an_integer(number: int, thousands: bool) -> None:
    spelled = f"{number:,}" if thousands else str(number)
    for text in (spelled, spelled.replace(",", "{,}"), spelled.replace(",", r"\,"), f"{spelled}.0", rf"\text{{{spelled}}}"):
        assert read_bare_number(text) == number


@given(st.integers(-999, 999), st.integers(1, 999))
def test_every_fraction(above: int, below: int) -> None:
    assert read_bare_number(rf"\frac{{{above}}}{{{below}}}") == Fraction(above, below)
    assert read_number(rf"{above}/{below} \text{{ cm}}") == Fraction(above, below)


@given(st.text(alphabet="\\{}boxed fx1$,", max_size=60))
@example("\\" * 59)
@example("{" * 60)
def test_boxes_balance(text: str) -> None:
    """Every box is a slice of the text with balanced unescaped braces, and boxes do not overlap."""
    boxes = closed_boxes(text)
    for before, after in itertools.pairwise(boxes):
        assert before.end <= after.start
    for box in boxes:
        inside = box.content.replace("\\\\", "").replace("\\{", "").replace("\\}", "")
        assert inside.count("{") == inside.count("}")
        assert text[: box.end].endswith(box.content + "}")


@given(
    st.lists(
        st.sampled_from([r"\boxed{1}", r"\fbox {2}", r"\boxed{", "}", "{", " and ", ", ", "box ", "x " * 900]), max_size=12
    )
)
@example([r"\boxed{1}", r"\boxed{", "x " * 900])
def test_reading_from_the_end_finds_what_reading_all_finds(pieces: list[str]) -> None:
    """The last box of the whole text, unless a box is longer than any answer."""
    text = "".join(pieces)
    boxes = closed_boxes(text)
    if not any(box.end - box.start > MAX_BOX_CHARS for box in boxes):
        assert last_boxes(text)[-1:] == boxes[-1:]


def test_a_box_far_before_the_end() -> None:
    assert grade(r"\boxed{34}" + " and so on" * 5000, "34", "stop").label == "correct"
    assert grade(r"\boxed{34} is wrong." + " and so on" * 5000 + r"\boxed{35", "34", "stop").label == "correct"
    assert grade(r"\boxed{35}" + ", " * 800 + r"\boxed{34}", "34", "stop").label == "wrong"


def test_a_gold_of_more_digits_than_python_reads() -> None:
    assert grade(r"\boxed{34}", "7" * 5000, "stop").reason == "unreadable gold"  # no box holds it


DAPO_RIGHT = [
    ("Answer: 34", "34"),
    ("so\nAnswer: $34$", "34"),
    ("**Answer:** 34", "34"),
    ("**Answer: 34**", "34"),
    ("answer : 34.", "34"),
    (r"Answer: \boxed{34}", "34"),
    (r"Answer: $n = 12{,}345$", "12345"),
    ("Answer: 33\nNo.\nAnswer: 34", "34"),
    (r"so $\boxed{34}$", "34"),
    (r"\boxed{33}, no, \boxed{34}", "34"),
    (r"Answer: x^2 + 1", "x^2+1"),
    (r"Answer: 34\%", "34"),
]
DAPO_WRONG = [
    ("Answer: 35", "34", "another number"),
    (r"\boxed{34}" + "\nAnswer: 35", "34", "another number"),
    ("It is 34.", "34", "no answer found"),
    ("Answer: 34" + " and so on" * (DAPO_WINDOW // 10), "34", "no answer found"),
    (r"\boxed{34}" + "." * DAPO_WINDOW, "34", "no answer found"),
    ("Answer:", "34", "no answer found"),
    (r"\boxed{}", "34", "empty box"),
    (r"\boxed{34", "34", "no answer found"),
    (r"Answer: 34\% or so", "34", "not equal"),
    (r"Answer: 2^{10}", "1024", "not equal"),
]


@pytest.mark.parametrize(("text", "gold"), DAPO_RIGHT)
def test_dapo_right(text: str, gold: str) -> None:
    assert grade_dapo(text, gold, "stop").label == "correct"


@pytest.mark.parametrize(("text", "gold", "reason"), DAPO_WRONG)
def test_dapo_wrong(text: str, gold: str, reason: str) -> None:
    verdict = grade_dapo(text, gold, "stop")
    assert (verdict.label, verdict.reason) == ("wrong", reason)


def test_dapo_cut_off() -> None:
    assert grade_dapo("Answer: 34", "34", "length").reason == "truncated"
    assert grade_dapo("Answer: 34", "34", "abort").label == "unknown"
