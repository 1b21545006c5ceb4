r"""Answers that starve, crash or mislead graders: towers of powers, endless sums, thousands of boxes, garbage.

All of them are wrong except the two in ``RIGHT``. Gold answers are integers, or ``x+1``, which is compared differently.
"""

from typing import NamedTuple


class Pathological(NamedTuple):
    name: str
    text: str
    gold: str = "34"


def _box(content: str) -> str:
    return rf"\boxed{{{content}}}"


def _joined(separator: str, pattern: str, numbers: range) -> str:
    return separator.join(pattern.replace("N", str(number)) for number in numbers)


_POWERS = [
    r"2^{2^{40}}",
    r"10^{10^9}+1",
    r"\sqrt{10^{10^{9}}+1}",
    r"7^{10^{9}}-7^{10^9-1}",
    r"9^{9^{9}}",
    r"9^{9^{9^{9}}}",
    r"3^{3^{3^{3}}}",
    r"99999999^{99999999}",
    r"7^{123456789}",
    r"2^{100000000}",
    r"2^{2005}-1",
    r"10^{-1000000000}",
    r"\frac{1}{2^{2^{34}}}",
    r"10^{(5^{5^{5^{5^{5}}} \cdot \log_{10}(5)} - 4)}",
    r"\log_{2}(3^{10^{9}})",
    r"((10!)!)!",
    r"\binom{200000}{100000}",
    r"\gcd(10^{100000}+1, 10^{99999}+1)",
    r"\lfloor 10^{1000000} \pi \rfloor",
    r"x^{10^{9}}+x=1",
    r"[0,10^{10^{10}}]",
    r"\{1,2,\ldots,10^{9}\}",
    "9⁹⁹⁹⁹",
]
_SUMS = [
    r"\sum_{k=1}^{1000000} \sin(k)",
    r"\sum_{k=1}^{10000000} \frac{1}{k^2}",
    r"\int_0^{\infty} \frac{\sin(x^3)\log(x)}{x^2+e^{x}} dx",
    r"\lim_{n \to \infty} \left(1+\frac{1}{n^{\sqrt{n}}}\right)^{n!}",
    r"\sin^{1000}(x)+\cos^{1000}(x)",
    _joined("+", r"\cos(N^\circ)", range(1, 90)),
    _joined("+", r"\sqrt{N}", range(1, 101)),
    r"\sqrt{2+" * 30 + "2" + "}" * 30,
    r"\frac{1}{1+" * 25 + "2" + "}" * 25,
]
_PLAIN = [
    "The answer is 2**(2**36)*1",
    "The answer is 99999999**99999999",
    "The answer is 2^2^2^2^2^2",
    "The result is 99999999999^99999999%",
    "So we get 3^(3^(20))+0",
    "The result is " + "+".join(["1"] * 5000),
    "The result is " + "(" * 2000 + "35" + ")" * 2000,
    r"Thus $x > 2^{2^{4^{8^{16}}}}$ so the value is $2^{2^{4^{8^{16}}}}$",
    r"\log_{2^4}(\log_{2^3}(\log_{2^2}(\log_{2^1}x))) > 0, so \( x > 2^{4^{8^{16}}} \): \boxed{2^{(2^2)^{(2^3)^{(2^4)}}}}",
]
_SPAM = [
    ("boxes", _joined(" ", r"\boxed{N}", range(2000))),
    ("unclosed boxes", r"\boxed{3" * 2000),
    ("opening brackets", "\n[ x =" * 5000),
    (r"\[ without end", r"\[ x " * 10_000),
    (r"\( without end", r"\( x " * 5000),
    ("dollars", "$a " * 10_000),
    ("spaced digits", "1 " * 20_000),
    ("loop", r"Wait, but $x=3$ so $y=\frac{1}{2}$. " * 1200),
    ("answer answer", "answer " * 3000),
    ("final answer is", "final answer is " * 3000),
    ("chain of equations", "$" + _joined("=", "N", range(5000)) + "$"),
    ("200,000 digits", _box("7" * 200_000)),
    ("100,000 decimals", _box("0." + "3" * 100_000)),
    ("long list", _box(_joined(",", "N", range(5000)))),
    ("many intervals", _box(_joined(r"\cup", "[N,N.5]", range(400)))),
    ("bars", _box("|" * 40 + "35" + "|" * 40)),
    ("unbalanced LaTeX", _box(r"\left\{\begin{array}{l}x+y=1\\\\\frac{}{}{}^{^{^{\right.}}}")),
]

RIGHT = [
    Pathological("2^(10^6) mod 7", _box(r"2^{10^{6}} \bmod 7"), "2"),  # 2^3 is 1 mod 7, and 10^6 is 1 mod 3
    Pathological("300 brackets", _box("(" * 300 + "34" + ")" * 300)),
]
PATHOLOGICAL = [
    *RIGHT,
    *(Pathological(text[:40], text) for text in (*map(_box, _POWERS + _SUMS), *_PLAIN)),
    *(Pathological(name, text) for name, text in _SPAM),
    Pathological("power of a sum", _box("(x+y+z)^{60}"), "x+y"),
    *(Pathological(f"{text[:40]} for x+1", _box(text), "x+1") for text in (*_POWERS[:4], _SUMS[1], _SUMS[4])),
    *(Pathological(f"{text[:40]} for x+1", text, "x+1") for text in _PLAIN[2:5:2]),
]
