"""The final evaluation's grader against hand-written verdicts. Its docstring lists its tolerances and departures."""

import json
import subprocess
import sys

import pytest

from nft_megatron.verify.simplerl import MAX_ALGEBRA_CHARS, extract, grade, respell

RIGHT = [
    # (answer text, gold)
    (r"so $\boxed{34}$.", "34"),
    (r"\boxed{34}", "034"),
    (r"\boxed{34.0}", "34"),
    (r"\boxed{12{,}345}", "12345"),
    (r"\boxed{32,348}", r"\$32,\!348"),
    (r"\boxed{0.3333}", r"\frac{1}{3}"),
    (r"\boxed{\dfrac{1}{2}}", "0.5"),
    (r"\boxed{\frac12}", r"\frac{1}{2}"),
    (r"\boxed{1/2}", r"\frac{1}{2}"),
    (r"\boxed{.5}", "0.5"),
    (r"\boxed{50\%}", "0.5"),
    (r"\boxed{0.5}", "50"),
    (r"\boxed{90}", r"90^\circ"),
    (r"\boxed{5}", "x=5"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{5.4 \text{ cents}}", "5.4"),
    (r"\boxed{864 \mbox{ inches}^2}", "864"),
    (r"\boxed{15 cm}", "15"),
    (r"\boxed{Evelyn}", r"\text{Evelyn}"),
    (r"\boxed{\text{(C)}}", "C"),
    (r"\boxed{\sqrt{50}}", r"5\sqrt2"),
    (r"\boxed{(x+1)^2}", "x^2+2x+1"),
    (r"\boxed{(0, 0.5)}", r"\left(0,\frac{1}{2}\right)"),
    (r"\boxed{\begin{pmatrix} 0.5 \\ 2 \end{pmatrix}}", r"\begin{bmatrix} \frac{1}{2} \\ 2 \end{bmatrix}"),
    (r"\boxed{\left[\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right]}", r"[\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}]"),
    (r"\boxed{2x - y = -1}", "2x - y + 1 = 0"),
    (r"\boxed{1,234,567}", "1234567"),
    (r"\boxed{(-\infty, 0]}", r"(-\infty,0]"),
    (r"\boxed{4.5e33}", "4.5e33"),
    (r"\boxed{4.5 \times 10^{33}}", "4.5e33"),
    (r"\boxed{4.5\times10^{33}\text{ erg/s}}", "4.5e33"),
    (r"\boxed{4.5 \cdot 10^{33}~\mathrm{erg}\,\mathrm{s}^{-1}}", "4.5e33"),
    (r"\boxed{L = 4.5 \times 10^{33} \text{ erg s}^{-1}}", "4.5e33"),
    (r"\boxed{10^{11}}", "1e11"),
    (r"\boxed{10^{-8} \mathrm{~m}}", "1e-8"),
    (r"\boxed{1 \times 10^{-5}}", "1e-5"),
    (r"\boxed{7 × 10^{37}}", "7e37"),
    (r"\boxed{0.00104}", "1.04e-3"),
    (r"\boxed{3.61e2 \text{ K}}", "3.61e2"),
    (r"\boxed{\cot x}", r"\cot(x)"),
    (r"The final answer is $\frac{1}{2}$. I hope it is correct.", "0.5"),
    ("The answer is 34.", "34"),
    ("First 17, then 1,234", "1234"),
    ("\\boxed{33}, no: \\boxed{34}", "34"),
    (r"\boxed{3 \pm 2\sqrt{2}}", r"3\pm2\sqrt{2}"),
]

WRONG = [
    (r"\boxed{35}", "34"),
    (r"\boxed{-34}", "34"),
    (r"\boxed{34.1}", "34"),
    ("", "34"),
    ("no number", "34"),
    (r"\boxed{}", "34"),
    (r"\boxed{6 \text{ and } 8}", "68"),
    (r"\boxed{6,8}", "68"),
    (r"\boxed{(c+5)(d+2)}", "(a+5)(b+2)"),
    (r"\boxed{\hat{j}}", r"\hat{i}"),
    (r"\boxed{\frac{1}{3}}", r"\frac{1}{2}"),
    (r"\boxed{(1, 3)}", "(1,2)"),
    (r"\boxed{(1, 2, 3)}", "(1,2)"),
    (r"\boxed{\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    (r"\boxed{\begin{pmatrix} 1 & 2 & 3 & 4 \end{pmatrix}}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    (r"\boxed{y = 2x + 2}", "y=2x+1"),
    (r"\boxed{x+1}", "x+2"),
    (r"\boxed{\text{west}}", r"\text{east}"),
    (r"\boxed{B}", "A"),
    (r"\boxed{4.5 \times 10^{34}}", "4.5e33"),
    (r"\boxed{4.6 \times 10^{33}}", "4.5e33"),
    (r"\boxed{4.5 \times 10^{-33}}", "4.5e33"),
    (r"\boxed{-4.5 \times 10^{33}}", "4.5e33"),
    (r"\boxed{10^{11} + 1}", "1e14"),
    (r"\boxed{3 + 2\sqrt{2}}", r"3\pm2\sqrt{2}"),
]


@pytest.mark.parametrize(("text", "gold"), RIGHT)
def test_right(text: str, gold: str) -> None:
    assert grade(text, gold).label == "correct", (respell(extract(text)), respell(gold))


@pytest.mark.parametrize(("text", "gold"), WRONG)
def test_wrong(text: str, gold: str) -> None:
    assert grade(text, gold).label == "wrong", (respell(extract(text)), respell(gold))


def test_golds_of_every_shape_verify_themselves() -> None:
    golds = [gold for _, gold in RIGHT + WRONG]
    assert {grade(rf"\boxed{{{gold}}}", gold).label for gold in golds} == {"correct"}
    assert [grade(rf"\boxed{{{gold}}}", gold).label for gold in ("34", "", "$$")] == ["correct", "unknown", "unknown"]


def test_a_long_text_is_compared_without_algebra() -> None:
    long = "+".join(["x"] * MAX_ALGEBRA_CHARS)
    assert grade(rf"\boxed{{{long}}}", long).label == "correct"
    assert grade(rf"\boxed{{{long}}}", f"{MAX_ALGEBRA_CHARS}x").label == "wrong"


def test_no_text_is_run_as_python(tmp_path) -> None:
    """SymPy's own parser of plain text evaluates it."""
    target = tmp_path / "made"
    text = rf"\boxed{{__import__('pathlib').Path('{target}').touch()}}"
    assert grade(text, "34").label == "wrong"
    assert not target.exists()


def test_it_needs_no_torch() -> None:
    program = r"""
import json, sys
from nft_megatron.verify.simplerl import grade
print(json.dumps([grade(r"\boxed{(x+1)^2}", "x^2+2x+1").label, "torch" in sys.modules]))
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120).stdout
    assert json.loads(output) == ["correct", False]
