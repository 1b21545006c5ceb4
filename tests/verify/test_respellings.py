r"""Other spellings of golds: that they mean the same, and that both graders of consequence read them."""

from fractions import Fraction
from typing import Any

import pytest
from bench_data import bench_rows, recorded
from own_answers import GENERAL_GOLDS
from own_questions import write_benchmarks
from strict_answers import CONTENTS

from nft_megatron.config.sections import VerifyConfig
from nft_megatron.data.gold_check import grade_spellings, spellings_of
from nft_megatron.verify.respellings import respellings
from nft_megatron.verify.service import Verifier

BENCHMARKS = ("aime24", "aime25", "amc23", "math500", "olympiadbench", "minerva_math")


@pytest.mark.parametrize(
    ("gold", "expected"),
    [
        ("34", {"brackets": r"\left(34\right)", "text": r"\text{34}", "decimal": "34.0", "e": "3.4e1"}),
        ("1500", {"times": r"1.5 \times 10^{3}", "cdot": r"1.5 \cdot 10^{3}", "power": None}),
        ("1000", {"power": "10^{3}", "fraction": None}),
        ("1e-07", {"decimal": "0.0000001", "times": r"1 \times 10^{-7}", "power": "10^{-7}", "e": None, "spaces": None}),
        ("-0.75", {"fraction": r"-\frac{3}{4}", "decimal": None, "times": r"-7.5 \times 10^{-1}"}),
        (r"\frac{1}{3}", {"slash": "1/3", "dfrac": r"\dfrac{1}{3}", "decimal": None, "times": None}),
        ("3/8", {"slash": r"\frac{3}{8}", "decimal": "0.375"}),
        (r"3\frac{1}{4}", {"slash": "3 1/4", "decimal": "3.25"}),
        (r"\frac{1+\sqrt{5}}{2}", {"slash": r"(1+\sqrt{5})/2", "decimal": None}),
        (r"\frac{1}{2}x", {"slash": None, "dfrac": r"\dfrac{1}{2}x"}),  # the x could be below the line
        (r"\frac{dy}{dx}=x", {"slash": None}),
        ("(0,1]", {"brackets": r"\left(0,1\right]", "spaces": "(0, 1]"}),
        (r"\left(3, \frac{\pi}{2}\right)", {"brackets": r"(3, \frac{\pi}{2})", "slash": r"\left(3, \pi/2\right)"}),
        ("(2,251,252)", {"spaces": None, "decimal": None}),
        ("12,345", {"spaces": None, "decimal": "12345.0"}),
        ("x+2y+3z-6=0", {"spaces": "x + 2y + 3z - 6 = 0", "brackets": None}),
        ("x + 1", {"spaces": "x+1"}),
        ("two-thirds", {"spaces": None}),
        ("Evelyn", {"text": r"\text{Evelyn}", "brackets": None}),
        (r"\text{Evelyn}", {"text": "Evelyn"}),
        (r"\sqrt[3]{2}", {"brackets": None}),
        (r"5\text{ cm}", {"spaces": r"5 \text{ cm}", "brackets": None}),
    ],
)
def test_spellings(gold: str, expected: dict[str, str | None]) -> None:
    found = respellings(gold)
    assert {kind: found.get(kind) for kind in expected} == expected


@pytest.mark.parametrize("number", [Fraction(1, 8), Fraction(-7, 20), Fraction(12345), Fraction(3, 10**9), Fraction(10**12)])
def test_decimals_and_powers_are_exact(number: Fraction) -> None:
    found = respellings(rf"\frac{{{number.numerator}}}{{{number.denominator}}}")
    assert Fraction(found["decimal"]) == number
    assert Fraction(found["e"]) == number
    mantissa, _, exponent = found["times"].partition(r" \times 10^")
    assert Fraction(mantissa) * Fraction(10) ** int(exponent.strip("{}")) == number


def exceptions(golds: list[str], mode: Any) -> list[tuple[str, str, str]]:
    spellings = [spelling for gold in dict.fromkeys(golds) for spelling in spellings_of(gold)]
    with Verifier(VerifyConfig(mode=mode, workers=2, soft_seconds=20.0, hard_seconds=600.0)) as verifier:
        verdicts = list(grade_spellings(spellings, verifier))
    return [tuple(spelling) for spelling, verdict in zip(spellings, verdicts, strict=True) if verdict.label != "correct"]


@pytest.mark.parametrize("mode", ["strict", "simplerl"])
def test_golds_of_our_own_are_read_in_every_spelling(mode: Any, tmp_path: Any) -> None:
    asked = [question.gold for _, questions in write_benchmarks(tmp_path).values() for question in questions]
    golds = [gold for _, gold, _, _ in GENERAL_GOLDS] + asked[::12]
    assert exceptions(golds, mode) == []


def test_strict_mode_reads_the_golds_of_its_cases_in_every_spelling() -> None:
    golds = [gold for cases in CONTENTS.values() for _, gold, _ in cases if "####" not in gold]
    assert exceptions(golds[::3], "strict") == []


@recorded(*(f"{name}.jsonl" for name in BENCHMARKS))
@pytest.mark.slow  # 7,000 comparisons in each mode
@pytest.mark.parametrize("mode", ["strict", "simplerl"])
def test_golds_of_the_benchmarks_are_read_in_every_spelling(mode: Any) -> None:
    golds = [row["answer"] for name in BENCHMARKS for row in bench_rows(f"{name}.jsonl")]
    assert len(golds) == 1547
    assert exceptions(golds, mode) == []
