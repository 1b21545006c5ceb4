r"""Equations: whose left side is only a name, and when two of them are the same.

``x = 5`` states the number 5 under a name, ``2x = 8`` and ``x^2 = 9`` state an equation. A name is a letter, possibly with an
index, prime or argument (``m_{\max}``, ``f(3)``), a figure (``\angle ABC``, ``AB``, ``|S|``), words, or a sum of different
letters (``m+n``).
"""

from __future__ import annotations

import re
from typing import Any

from nft_megatron.verify.numbers import tight

_INDEX = r"(?:_(?:[0-9A-Za-z]|\{[^{}]*+\}|\\[a-z]++))?+"
_LETTER = rf"(?:[A-Za-z]|\\(?!angle|frac|text|math)[A-Za-z]++){_INDEX}'*+"
_FUNCTIONS = r"\\(?:gcd|max|min|det|deg|Pr)|\\(?:operatorname|text|mathrm)\{[A-Za-z ]++\}|[fghFGHPETSN]"
_NAME = re.compile(
    rf"(?:{_LETTER}(?::{_LETTER})?+"
    rf"|(?:{_FUNCTIONS}){_INDEX}'*+\([^()=<>]*+\)"
    r"|[a-zA-Z]\([xnt0-9]\)|E\[[A-Z]\]"
    r"|(?:\\angle|\\triangle|\\overline|\\overrightarrow|\\widehat|\\measuredangle|m\\angle)[\s{]*+[A-Z][A-Z0-9]*+\}?"
    r"|[A-Z]{2,4}|\((?:[A-Za-z],)++[A-Za-z]\)"
    r"|\|(?:[A-Z]++|[zwv])\||\[[A-Z]++\]"
    r"|\\(?:text|mathrm|textbf|mbox)\{[^{}]*+\}"
    rf"|{_LETTER}(?:\+{_LETTER})++)"
)
_D = r"(?:d|\\partial)\s*+"
_DERIVATIVE = re.compile(rf"\\frac\{{{_D}(?:\^\{{?[2-9]\}}?\s*+)?+[A-Za-z]\}}\{{{_D}[A-Za-z](?:\^\{{?[2-9]\}}?)?+\}}")
_COMMAND_OF_A_VALUE = re.compile(
    r"\\(?:pi|infty|sqrt|frac|cdot|times|pm|mp|log|ln|sin|cos|tan|cot|sec|csc|exp|circ|emptyset|sum|int|lim)(?![A-Za-z])"
)
_RELATION = re.compile(
    r"<|>|\\(?:n?[lg]eq?(?:slant)?|neq?|[lg]t|approx|sim|simeq|equiv|cong|pmod|bmod|iff|in|notin|implies|Rightarrow|quad)(?![A-Za-z])"
)
_NOT_EQUAL_SIGN = re.compile(r"[<>!:]=|\\(?:not|begin)|\|\||\\mid")
_INDICES = re.compile(r"_(?:[0-9A-Za-z]|\{[^{}]*+\}|\\[a-z]++)")
_LETTERS = re.compile(r"\\[A-Za-z]++|[A-Za-z]")


def sides(text: str) -> list[str]:
    """What stands between the equals signs of ``text``; a single element if it is no equation."""
    if "=" not in text or _NOT_EQUAL_SIGN.search(text) or _RELATION.search(text):
        return [text]
    parts = [tight(part) for part in text.split("=")]
    return parts if all(parts) else [text]


def is_name(text: str) -> bool:
    r"""Whether ``text`` only names a quantity.

    >>> [is_name(text) for text in ("x", r"m_{\max}", "f(3)", r"\angle ABC", "m+n", "2x", "x^2", "x+x", "p-q", r"\pi", "xy")]
    [True, True, True, True, True, False, False, False, False, False, False]
    """
    text = tight(text)
    if _COMMAND_OF_A_VALUE.match(text):
        return _DERIVATIVE.fullmatch(text) is not None
    letters = re.split("[+,:]", text.strip("()"))
    return len(set(letters)) == len(letters) and _NAME.fullmatch(text) is not None


def assigned(text: str) -> tuple[str, str] | None:
    r"""Name and value of ``name = value``, where the value does not contain the name; None for any other text.

    >>> assigned("x = 5"), assigned("5 = x"), assigned("f(x) = x^2"), assigned("2x = 8"), assigned("x = 2 - x"), assigned("8")
    (('x', '5'), ('x', '5'), ('f(x)', 'x^2'), None, None, None)
    """
    match sides(text):
        case [name, value] if is_name(name) and not _occurs(name, value):
            return name, value
        case [value, name] if is_name(name) and len(name) == 1 and not _occurs(name, value):
            return name, value
    return None


def _occurs(name: str, value: str) -> bool:
    """Arguments and indices do not count: ``f(x) = x^2`` and ``a_n = 2^n`` define f and a."""
    if "(" in name or name.startswith((r"\text", r"\frac")):
        return False
    return not set(_LETTERS.findall(_INDICES.sub("", name))).isdisjoint(_LETTERS.findall(value))


def same_equation(answer: str, gold: str) -> bool:
    """Whether two equations differ by a factor, by the order of their terms or sides: computer algebra, which may take long.

    The difference of the sides, without denominators, of one must be a constant times that of the other.
    """
    from sympy import expand, fraction, simplify, together

    first, second = (_difference(text) for text in (answer, gold))
    if first is None or second is None:
        return False
    first, second = (expand(fraction(together(side))[0]) for side in (first, second))
    if first.free_symbols != second.free_symbols or first == 0 or second == 0:
        return bool(first == second)
    ratio = first / second
    point = {symbol: number for number, symbol in enumerate(sorted(first.free_symbols, key=str), start=3)}
    other = {symbol: number * number + 2 for symbol, number in point.items()}
    if _far_apart(ratio, point, other):
        return False
    ratio = simplify(ratio)
    return bool(ratio.is_number and ratio.is_finite and ratio != 0)


def _far_apart(ratio: Any, point: dict[Any, int], other: dict[Any, int]) -> bool:
    try:
        one, two = complex(ratio.subs(point).evalf()), complex(ratio.subs(other).evalf())
    except (TypeError, ValueError, ZeroDivisionError):  # no value there
        return False
    return abs(one - two) > 1e-6 * (abs(one) + abs(two))


def _difference(equation: str) -> Any:
    """Left minus right side as a SymPy expression; None if it cannot be read."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from sympy import Expr

    values = []
    for side in equation.split("="):
        try:
            value = latex2sympy(side, normalization_config=NormalizationConfig(basic_latex=True, boxed="none"))
        except Exception:  # whatever the parser raises, it could not read the text
            return None
        values.append(value)
    if len(values) != 2 or not all(isinstance(value, Expr) for value in values):
        return None
    return (values[0] - values[1]).doit()
