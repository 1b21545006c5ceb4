"""What counts as the same question, and what as the same answer."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from bench_data import BENCH, bench_rows, recorded
from own_questions import CONFLICTS, TRAINING, write_training

from nft_megatron.base.records import Question
from nft_megatron.data.conflicts import find_conflicts
from nft_megatron.data.questions import load_questions
from nft_megatron.data.wording import worded


def questions(*pairs: tuple[str, str]) -> list[Question]:
    return [Question(f"q{i}", ({"role": "user", "content": text},), gold) for i, (text, gold) in enumerate(pairs)]


def ids(groups: Sequence[Sequence[Question]]) -> list[list[str]]:
    return [[question.question_id for question in group] for group in groups]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 1+1?", "What is 1+1?"),
        ("What is $1+1$?", "What  is\n\\(1 + 1\\)"),
        ("Initially, the room is empty. Find $n$.", "Initially the room is empty; find\\ $n$".replace("find", "Find")),
        ("f'(2)", "f^{\\prime}(2)"),
        ("f''(2)", "f′′(2)"),
        ("1, 2, 3", "1,2,3"),
        ("12\\,345 is", "12345 is"),
        ("What is 1+1?", worded("What is 1+1?", "answer")),
        (worded("What is 1+1?", "boxed"), worded("What is 1+1?", "answer")),
    ],
)
def test_same_questions(one: str, other: str) -> None:
    assert ids(find_conflicts(questions((one, "2"), ("another", "5"), (other, "3")))) == [["q0", "q2"]]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("7-9", "7+9"),
        ("x^{12}", "x^{1}2"),
        ("1.5", "15"),
        ("1,5", "15"),
        ("A_1", "a_1"),
        ("有红球", "有白球"),
        ("n < 3", "n > 3"),
        ("Find f(2).", "Find f'(2)."),
        ("f'(2)", "f''(2)"),
        ("f^{(2)}(x)", "f''(x)"),
        ("\\dot{x}=3", "x=3"),
        ("The sum of 1, 2 and 3", "The sum of 12 and 3"),
        ("the digits $1$ $2$", "the digits $12$"),
        ("3 1/4", "31/4"),
        ("(1,2)", "(12)"),
        ("[1,2)", "[1,2]"),
        ("a:b", "ab"),
        ("5!", "5"),
        ("|x|=3", "x=3"),
        ("50\\%", "50"),
    ],
)
def test_different_questions(one: str, other: str) -> None:
    assert find_conflicts(questions((one, "2"), (other, "3"))) == []


def test_golds_that_agree_are_no_conflict() -> None:
    assert find_conflicts(questions(("a", "025"), ("a", "25"), ("a", " 25.0"), ("b", "x"), ("b", "x "))) == []
    assert ids(find_conflicts(questions(("a", "25"), ("b", "x"), ("b", "y"), ("a", "26"), ("a", "25")))) == [
        ["q0", "q3", "q4"],
        ["q1", "q2"],
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\dfrac{\pi}{2}", r"\frac{\pi}{2}"),
        ("π/2", r"\frac{\pi}{2}"),
        (r"\frac\pi2", r"\tfrac{1}{2}\pi"),
        (r"\frac{-\pi}{2}", r"$-\pi/2$"),
        (r"\frac{2\pi}{3}", r"2\pi/3"),
        (r"\sqrt{2}", r"\sqrt2"),
        ("0.5", "½"),
        ("1e-07", "10^{-7}"),
        ("12{,}345", "12,345"),
        (r"\left(1, 2\right)", "(1,2)"),
        (r"\text{Yes}", "Yes"),
        ("x=5", "5"),
        (r"90^\circ", "90°"),
    ],
)
def test_a_gold_in_two_spellings_is_no_conflict(one: str, other: str) -> None:
    assert find_conflicts(questions(("a", one), ("a", other))) == find_conflicts(questions(("a", other), ("a", one))) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\pi/2", r"\pi/3"),
        ("-1", "1"),
        ("A", "a"),
        (r"\sqrt{2}", "1.41421"),
        ("(1,2)", "(2,1)"),
        ("1/31!", "1/33!"),
        ("2x", "2y"),
    ],
)
def test_golds_that_differ_are_a_conflict(one: str, other: str) -> None:
    assert ids(find_conflicts(questions(("a", one), ("a", other)))) == [["q0", "q1"]]


def test_conflicts_of_a_file_in_dapo_wording(tmp_path: Path) -> None:
    """To the letter and in other typesetting; neither another spelling of the gold nor another sign in the question."""
    loaded = load_questions([write_training(tmp_path / "train.parquet")])
    assert [question.question_id for question in loaded] == [asked.question_id for asked in TRAINING]
    assert ids(find_conflicts(loaded)) == CONFLICTS


@recorded("dapo_math_17k.jsonl")
def test_conflicts_of_dapo() -> None:
    """The 11 that agree to the letter, as that data's own README counts them; the others, read one by one, are one problem."""
    conflicts = find_conflicts(load_questions([BENCH / "dapo_math_17k.jsonl"]))
    golds: dict[str, set[str]] = {}
    for row in bench_rows("dapo_math_17k.jsonl"):
        golds.setdefault(row["question"], set()).add(row["answer"])
    to_the_letter = {text for text, given in golds.items() if len(given) > 1}
    assert len(to_the_letter) == 11
    assert to_the_letter <= {question.text for group in conflicts for question in group}
    assert len(conflicts) == 22
