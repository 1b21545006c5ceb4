"""Recorded model outputs and human solutions, where there are any; test_own_answers has the same for the project's own.

Kinds: ``aime_human``, ``math500_pos`` human solutions; ``math500_neg`` the same against other golds; ``int_pos``, ``int_neg``
constructed; ``qwen_recorded``, ``mathcoder_recorded`` model outputs with another grader's verdict, which is sometimes mistaken.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from bench_data import bench_rows, recorded

from nft_megatron.base.records import Verdict
from nft_megatron.config.sections import VerifyConfig
from nft_megatron.verify.boxes import closed_boxes, last_boxes
from nft_megatron.verify.grade import Undecided, grade
from nft_megatron.verify.numbers import read_bare_number
from nft_megatron.verify.service import Verifier

UNHURRIED = {"workers": 1, "soft_seconds": 20.0, "hard_seconds": 600.0}  # starting a grader costs more than its work here


def open_verifier(mode: str) -> Verifier:
    return Verifier(VerifyConfig.model_validate({"mode": mode, **UNHURRIED}))


def verdicts_of(verifier: Verifier, rows: list[dict[str, Any]]) -> list[Verdict]:
    return list(verifier.verify_many((row["pred_text"], row["gold"], "stop") for row in rows))


@pytest.fixture(scope="module")
def math_verify() -> Iterator[Verifier]:
    with open_verifier("math-verify") as verifier:
        yield verifier


@pytest.fixture(scope="module")
def by_math_verify(math_verify: Verifier) -> list[Verdict]:
    """On the whole text."""
    return verdicts_of(math_verify, bench_rows("verifier_cases.jsonl"))


@pytest.fixture(scope="module")
def by_strict() -> list[Verdict]:
    with open_verifier("strict") as verifier:
        return verdicts_of(verifier, bench_rows("verifier_cases.jsonl"))


def has_integer_gold(row: dict[str, Any]) -> bool:
    number = read_bare_number(row["gold"])
    return number is not None and number.denominator == 1


@recorded("dapo_math_17k.jsonl")
def test_every_training_gold_is_right_when_echoed() -> None:
    rows = bench_rows("dapo_math_17k.jsonl")
    verdicts = [grade(rf"So the answer is $\boxed{{{row['answer']}}}$.", row["answer"], "stop") for row in rows]
    assert len(verdicts) == 17_917
    assert all(not isinstance(verdict, Undecided) and verdict.label == "correct" for verdict in verdicts)


@recorded("verifier_cases.jsonl")
def test_integer_golds() -> None:
    """No false positive, and no right answer in a box is missed but those listed."""
    rows = [row for row in bench_rows("verifier_cases.jsonl") if has_integer_gold(row)]
    verdicts = [grade(row["pred_text"], row["gold"], "stop") for row in rows]
    counts = Counter(
        (row["kind"], row["label"], "undecided" if isinstance(verdict, Undecided) else verdict.label)
        for row, verdict in zip(rows, verdicts, strict=True)
    )
    assert {key: n for key, n in counts.items() if key[0] in ("aime_human", "int_pos", "int_neg", "math500_pos")} == {
        ("aime_human", True, "correct"): 677,
        ("int_pos", True, "correct"): 165,
        ("int_neg", False, "wrong"): 153,
        ("math500_pos", True, "correct"): 204,
    }
    accepted = [row for row, verdict in zip(rows, verdicts, strict=True) if getattr(verdict, "label", "") == "correct"]
    mistaken = [row["gold"] for row in accepted if not row["label"]]
    assert mistaken == ["10{,}000"], r"where the recorded grader, not this one, was wrong about \boxed{10000}"
    missed = [
        (row["kind"], verdict.reason)
        for row, verdict in zip(rows, verdicts, strict=True)
        if row["label"]
        and not isinstance(verdict, Undecided)
        and verdict.label == "wrong"
        and verdict.reason != "no closed box"
    ]
    # \boxed{3.999999} for 4, and a money sum whose "$10,455$" stands outside of any box.
    assert sorted(missed) == [
        ("mathcoder_recorded", "another number"),
        ("mv_tests", "another number"),
    ]


@recorded("verifier_cases.jsonl")
@pytest.mark.slow
def test_strict_differs_from_math_verify_only_in_the_classes_of_the_docs(
    by_strict: list[Verdict], by_math_verify: list[Verdict], math_verify: Verifier
) -> None:
    """The classes are those of docs/verification.md, and no case is in none of them."""
    rows = bench_rows("verifier_cases.jsonl")
    classes = Counter(
        class_of(row, strict, math_verify)
        for row, strict, whole in zip(rows, by_strict, by_math_verify, strict=True)
        if strict.label != whole.label
    )
    assert classes == {
        "no box": 104,  # math-verify takes the last number of the text
        "nearby boxes": 11,  # math-verify merges them
        "tiny numbers": 2,  # 1/2^98 for 1/2^99: math-verify rounds to 15 places
        "clock": 6,  # 4:30 \text{ p.m.} for \text{4:30 p.m.}
        "spelling": 20,  # \fbox{g}, \boxed {g}, 12\,345, \textbf{(051) }: right, but math-verify does not read them
    }


def class_of(row: dict[str, Any], strict: Verdict, math_verify: Verifier) -> str:
    if strict.label == "unknown":
        return "deadline"
    if strict.reason in ("no closed box", "empty box"):
        return "no box"
    if strict.reason == "several answers" or len(closed_boxes(row["pred_text"])) > 1:
        return "nearby boxes"
    content = last_boxes(row["pred_text"])[-1].content
    if ":" in content + row["gold"]:
        return "clock"
    if not row["label"] and r"\frac{1}{" in content:
        return "tiny numbers"
    if row["label"] and strict.reason == "exact":
        return "spelling"
    boxed = math_verify.submit(rf"\boxed{{{content}}}", row["gold"], "stop").result()
    return "text outside the box" if boxed.label == strict.label else "other"


@recorded("verifier_cases.jsonl")
def test_human_solutions(by_strict: list[Verdict]) -> None:
    """Of MATH-500, with its own gold and with others', whatever kind of gold."""
    pairs = zip(bench_rows("verifier_cases.jsonl"), by_strict, strict=True)
    verdicts = [(verdict.label == "correct", row["label"]) for row, verdict in pairs if row["kind"].startswith("math500")]
    assert len(verdicts) == 639
    assert all(is_right == label for is_right, label in verdicts)


@recorded("verifier_cases.jsonl")
@pytest.mark.slow
def test_simplerl_agrees_with_math_verify(by_math_verify: list[Verdict]) -> None:
    """On recorded answers and human solutions; its tolerance of 1e-4 takes 9999 for 10000."""
    kinds = ("aime_human", "math500_pos", "math500_neg", "qwen_recorded")
    pairs = zip(bench_rows("verifier_cases.jsonl"), by_math_verify, strict=True)
    chosen = [(row, other) for row, other in pairs if row["kind"] in kinds]
    with open_verifier("simplerl") as verifier:
        verdicts = verdicts_of(verifier, [row for row, _ in chosen])
    agreement = [verdict.label == other.label for verdict, (_, other) in zip(verdicts, chosen, strict=True)]
    assert len(agreement) == 1824
    assert sum(agreement) / len(agreement) >= 0.998


@recorded("verifier_cases.jsonl")
def test_math_verify_mode_agrees_with_the_reference_implementation(math_verify: Verifier) -> None:
    """Against verifier.py of the public NFT code: math_metric called directly, in the main thread."""
    from math_verify.metric import math_metric
    from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

    rows = bench_rows("verifier_cases.jsonl")[::12]
    verdicts = verdicts_of(math_verify, rows)
    metric = math_metric((LatexExtractionConfig(),), (ExprExtractionConfig(), LatexExtractionConfig()))
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    expected = [metric([rf"\boxed{{{row['gold']}}}"], [row["pred_text"]])[0] > 0.5 for row in rows]
    assert [verdict.label == "correct" for verdict in verdicts] == expected
