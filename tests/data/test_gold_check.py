"""Golds that the verifier does not match in every spelling, in each mode, and the rule of one in a hundred."""

from typing import Any

import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.config.sections import VerifyConfig
from nft_megatron.data.gold_check import Unmatched, refuse_unmatched, unmatched_golds
from nft_megatron.verify.reasons import verdict
from nft_megatron.verify.service import Verifier

GOLDS = ["34", "-7", "1,234", "0.75", r"\frac{3}{4}", "1e-07", "4.5e33", "x^2+1", "(3,5)", r"\frac{\sqrt{2}}{2}", r"\text{Yes}"]


class Recorder:
    """A verifier that says of an answer what ``reasons`` says, else that it is exact."""

    is_free = False

    def __init__(self, reasons: dict[str, str]) -> None:
        self.reasons, self.asked = reasons, list[tuple[str, str]]()

    def verify_many(self, answers: Any) -> Any:
        for text, gold, finish_reason in answers:
            assert finish_reason == "stop"
            answer = text.removeprefix(r"\boxed{").removesuffix("}")
            self.asked.append((answer, gold))
            yield verdict(self.reasons.get(answer, "exact"), "v")


def check(golds: list[str], reasons: dict[str, str]) -> tuple[dict[str, Unmatched], list[tuple[str, str]]]:
    recorder = Recorder(reasons)
    return unmatched_golds(golds, recorder), recorder.asked  # type: ignore[arg-type]


def test_each_gold_is_tried_once_with_its_other_spellings() -> None:
    found, asked = check(["x", "0.5", "x", "a\nb", "7", "-7"], {})
    assert found == {"a\nb": Unmatched("several lines")}
    assert asked == [
        ("x", "x"),
        ("0.5", "0.5"),
        (r"\frac{1}{2}", "0.5"),
        (r"5 \times 10^{-1}", "0.5"),
    ]


def test_the_first_spelling_that_is_not_matched_is_named() -> None:
    found, _ = check(
        ["0.5", "x", "y", "z"], {r"\frac{1}{2}": "not equal", "x": "crash", "y": "soft limit", "z": "unreadable gold"}
    )
    assert found == {"0.5": Unmatched("not equal", r"\frac{1}{2}"), "x": Unmatched("crash"), "z": Unmatched("unreadable gold")}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("strict", set()),
        ("simplerl", set()),
        ("dapo", {r"\frac{\sqrt{2}}{2}"}),  # it compares numbers and texts
        ("math-verify", {"1e-07", "4.5e33"}),  # it reads an e as the constant
    ],
)
def test_what_each_mode_matches(mode: Any, expected: set[str]) -> None:
    with Verifier(VerifyConfig(mode=mode, workers=1, soft_seconds=20.0, hard_seconds=600.0)) as verifier:
        assert set(unmatched_golds(GOLDS, verifier)) == expected


def test_plain_integers_are_not_tried() -> None:
    """As many as DAPO-Math-17k has."""
    assert check([str(number % 3000) for number in range(-500, 17_500)], {}) == ({}, [])


def test_more_than_one_in_a_hundred_is_refused() -> None:
    places = [(str(i), f"row {i}") for i in range(198)] + [("0.5", "row 198"), ("a\nb", "row 199")]
    unmatched = {"0.5": Unmatched("not equal", r"\frac{1}{2}"), "a\nb": Unmatched("several lines")}
    refuse_unmatched(places, unmatched, "FIELD", "--mode strict", "do")
    with pytest.raises(UserError) as caught:
        refuse_unmatched(places[1:], unmatched, "FIELD", "--mode strict", "do")
    assert str(caught.value) == (
        "FIELD = 2 of 199 questions: have a gold that right answers may not match under --mode strict (not equal, respelled: "
        r"1, several lines: 1); the first is '0.5' (written as '\\frac{1}{2}') in row 198; do"
    )
