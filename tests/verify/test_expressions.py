"""Values of expressions against math-verify's reading, and "different" against its verdicts.

NFT_MEGATRON_FUZZ sets how many expressions are tried (10000 take a few minutes).
"""

import decimal
import logging
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from fractions import Fraction

import pytest
import sympy
from bench_data import bench_rows, recorded
from math_verify.parser import LatexExtractionConfig, parse

from nft_megatron.verify.boxes import last_boxes, unboxed
from nft_megatron.verify.expressions import Value, differ, value_of
from nft_megatron.verify.worker import judge_math_verify

NUM_EXPRESSIONS = int(os.environ.get("NFT_MEGATRON_FUZZ", "400"))
BENCHMARKS = ("math500", "olympiadbench", "minerva_math")  # whose golds are not all integers
LETTERS = "abcfghjklmnopqrstuvwxyzABNX"

logging.getLogger("math_verify").setLevel(logging.CRITICAL)


class TooLongError(BaseException):
    """Not an ``Exception``: math-verify catches all of those."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Computer algebra may take forever; callers count how many expressions remain."""

    def give_up(signum, frame):
        raise TooLongError

    before = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def expression(rng: random.Random, depth: int) -> str:
    """Random LaTeX, with everything that can be written in more than one way."""
    if depth == 0 or rng.random() < 0.2:
        return rng.choice([str(rng.randint(0, 30)), str(rng.randint(2, 9)), rng.choice("xynabk"), rng.choice(LETTERS), r"\pi"])
    a, b, digit = expression(rng, depth - 1), expression(rng, depth - 1), rng.randint(1, 9)
    return rng.choice(
        [
            f"{a} + {b}",
            f"{a}-{b}",
            f"{a}{b}",
            f"{a} {b}",
            f"{a}({b})",
            f"({a})({b})",
            f"({a}){b}",
            f"{digit}{b}",
            f"{digit}({b})",
            rf"\frac{{{a}}}{{{b}}}",
            rf"\dfrac{{{a}}}{{{b}}}",
            rf"\frac{{{a}}}{{{b}}}{a[0]}",
            rf"\frac{digit}{digit}",
            rf"\frac{digit}{{{b}}}",
            f"{a}/{b}",
            f"{a}/({b})",
            rf"\sqrt{{{a}}}",
            rf"\sqrt{a[-1]}",
            rf"{digit}\sqrt{{{b}}}",
            f"{a}^{b}",
            f"{a}^{{{b}}}",
            f"({a})^{digit % 4}",
            f"{a}^{digit % 4}",
            rf"{a}\cdot {b}",
            rf"{a}\times{b}",
            f"{a}*{b}",
            f"-{a}",
            f"-({a})",
            f"{{{a}}}",
            rf"\left({a}+{b}\right)",
            rf"{a}\pi {b}",
            f"{a}+-{b}",
        ]
    )


def by_math_verify(text: str) -> Decimal | None:
    """What math-verify reads, with our numbers for its variables; None if it cannot read or evaluate that."""
    with at_most(0.5):
        parsed = parse(rf"\boxed{{{text}}}", (LatexExtractionConfig(),), parsing_timeout=None)
        if not parsed or isinstance(parsed[0], str):
            return None
        values = {symbol: sympy.Rational(str(value_of(f"{symbol}+0"))) for symbol in parsed[0].free_symbols}
        return Decimal(str(sympy.N(parsed[0].subs(values).doit(), 40)))


def as_decimal(value: Value | None) -> Decimal | None:
    with decimal.localcontext(decimal.Context(prec=60)):
        return Decimal(value.numerator) / Decimal(value.denominator) if isinstance(value, Fraction) else value


def test_an_expression_has_the_value_that_math_verify_reads() -> None:
    rng = random.Random(20250518)
    num_read = 0
    for _ in range(NUM_EXPRESSIONS):
        text = expression(rng, rng.randint(1, 4))
        value = as_decimal(value_of(text))
        if value is None:
            continue
        with suppress(TooLongError):
            expected = by_math_verify(text)
            num_read += expected is not None
            assert expected is None or abs(value - expected) < Decimal("1e-9"), text
    assert num_read > NUM_EXPRESSIONS / 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2^{10}", 1024),
        ("-2^2", -4),
        (r"\frac{1}{2}+\frac14", Decimal("0.75")),
        (r"\frac{3}{4}-2^{-2}", Decimal("0.5")),
        ("3/4/5", Decimal("0.15")),
        (r"2\sqrt{9}", 6),
        (r"\sqrt4", 2),
        (r"\left(1+2\right)\cdot 3", 9),
        ("2(x+1)-2x", 2),
        ("(x+1)^2(x-1)-(x^2-1)(x+1)", 0),
        ("AB-ab", 0),
        (r"\pi r^2/r^2-\pi", 0),
        ("x^{y+1}-x*x^y", 0),
    ],
)
def test_values(text: str, value: Decimal) -> None:
    read = as_decimal(value_of(text))
    assert read is not None
    assert abs(read - value) < Decimal("1e-40")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "abc",
        "1/2x",
        "1/2(3)",
        "3(4)",
        "(3)(4)",
        "2^3^4",
        "x^23",
        r"2\frac13",
        r"2\frac{1}{3}",
        "f(x)",
        r"\pi(x)",
        "5m",
        r"\frac{1}{2}c",
        "3ab",
        "2 3",
        "a b",
        "x2",
        "0.5",
        "1,000",
        "50%",
        "n!",
        "x=2",
        "i+1",
        "e^2",
        "dx+1",
        "x_1+1",
        r"\sqrt[3]{8}",
        r"\sqrt{-1}",
        "1/0",
        "1/(x-x)",
        "{1}",
        "(1",
        "1)",
        "1+",
        "*2",
        "x+-y",
        r"\sin x",
        "9^{9^9}",
        r"10^{21}\pi",
        "(-1)^{1/2}",
        "9" * 300,
        "(" * 150 + "x" + ")" * 150 + "+1",
    ],
)
def test_ambiguous_text_is_not_read(text: str) -> None:
    assert value_of(text) is None


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("x^2-4", "(x-2)(x+2)"),
        (r"\sqrt{8}", r"2\sqrt2"),
        ("(1,2)", "(1,2,3)"),
        ("(2,1)", r"\{1,2\}"),
        ("[1,2]", "(1,3)"),
        ("n+1", "m+1"),
        ("x+1", "X+1"),
        ("2", "2m"),
        ("0.33", r"\frac13"),
        ("1, 2", "2, 1"),
        (r"(1,\frac{2}{4})", "(1, 2/4)"),
        (r"\frac{m}{2}m", r"\frac{m}{2}"),
        ("[1,3)", "(1,2)"),
        ("(3,2]", "(3,1]"),
        ("y=x", "z=x"),
        ("2x", "y=3x"),
        ("x=y=1", "x=y=2"),
        ("(1,2)(3,4)", "(1,2)(3,5)"),
        ("y=0.5x", "y=x"),
        ("f(x)=2x", "f(x)=3x"),
    ],
)
def test_what_may_be_equal_is_left_open(answer: str, gold: str) -> None:
    assert not differ(answer, gold)


def test_what_differs_in_random_answers_differs_for_math_verify() -> None:
    rng = random.Random(20250519)
    num_compared = 0
    while num_compared < NUM_EXPRESSIONS / 4:
        a, b, c, d = (expression(rng, rng.randint(0, 2)) for _ in range(4))
        gold, answer = rng.choice(
            [
                (a, b),
                (f"y={a}", f"y={b}"),
                (f"({a},{b})", f"({b},{a})"),
                (f"[{a},{b}]", f"[{a},{c}]"),
                (f"({a},{b},{c})", f"({a},{d},{c})"),
            ]
        )
        if differ(answer, gold):
            with suppress(TooLongError), at_most(0.5):
                num_compared += 1
                assert judge_math_verify(gold, rf"\boxed{{{answer}}}")[0] != "equal", (answer, gold)


@recorded("verifier_cases.jsonl", *(f"{name}.jsonl" for name in BENCHMARKS))
def test_what_differs_in_recorded_answers_differs_for_math_verify() -> None:
    """All boxes of the recorded answers against their golds, and every gold of the benchmarks against its neighbour's."""
    pairs = {
        (unboxed(boxes[-1].content), row["gold"].strip())
        for row in bench_rows("verifier_cases.jsonl")
        if (boxes := last_boxes(row["pred_text"]))
    }
    for name in BENCHMARKS:
        golds = [row["answer"].strip() for row in bench_rows(f"{name}.jsonl")]
        pairs |= set(zip(golds, [*golds[1:], golds[0]], strict=True))
    different = sorted(pair for pair in pairs if differ(*pair))
    assert len(different) > 800
    others = [pair for pair in different if judge_math_verify(pair[1], rf"\boxed{{{pair[0]}}}")[0] != "not equal"]
    assert all("frac{" in text and "2^{" in text for pair in others for text in pair), others  # it rounds to 15 places
