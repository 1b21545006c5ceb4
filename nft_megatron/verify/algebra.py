"""The comparison of strict mode that needs computer algebra; runs in a worker process.

Two equations are compared as equations; everything else by math-verify, whose agreement is confirmed at one point: it rounds to
15 digits after the point, where tiny numbers are all the same.
"""

from __future__ import annotations

from typing import Any

from nft_megatron.verify.boxes import closed_boxes
from nft_megatron.verify.equations import same_equation, sides

_DIGITS, _RELATIVE_ERROR = 50, 1e-12


def compare_equations(gold: str, text: str) -> bool | None:
    """Whether both are the same equation; None if one of them is none."""
    answer = closed_boxes(text)[0].content
    if len(sides(answer)) != 2 or len(sides(gold)) != 2:
        return None
    return same_equation(answer, gold)


def is_confirmed(expected: Any, given: Any) -> bool:
    """False if two expressions that were found equal have different values at a point."""
    from sympy import Expr, Float, UnevaluatedExpr

    if not (isinstance(expected, Expr) and isinstance(given, Expr)) or expected.has(Float, UnevaluatedExpr) or given.has(Float):
        return True
    symbols = sorted(expected.free_symbols | given.free_symbols, key=str)
    if {str(symbol).lower() for symbol in expected.free_symbols} != {str(symbol).lower() for symbol in given.free_symbols}:
        return True  # a name that is a unit
    point = {symbol: 2 + (sum(map(ord, str(symbol).lower())) % 97) for symbol in symbols}
    try:
        one, other = (complex(side.doit().subs(point).evalf(_DIGITS)) for side in (expected, given))
        return not abs(one - other) > _RELATIVE_ERROR * max(abs(one), abs(other))  # nor if it is not a number
    except Exception:  # no value there: a set, infinity, an unknown function
        return True


def are_equal_factorials(expected: Any, given: Any) -> bool:
    """Whether two expressions are equal if factorials and binomials are cancelled; False if neither has any."""
    from sympy import Expr, binomial, combsimp, factorial

    if not (isinstance(expected, Expr) and isinstance(given, Expr)):
        return False
    return (expected.has(factorial, binomial) or given.has(factorial, binomial)) and bool(combsimp(expected - given) == 0)


def are_equal_complex(expected: Any, given: Any) -> bool:
    """Whether two expressions are equal if the letter i is the imaginary unit; False if neither has it."""
    from sympy import Expr, I, simplify

    if not (isinstance(expected, Expr) and isinstance(given, Expr)):
        return False
    units = {symbol: I for side in (expected, given) for symbol in side.free_symbols if str(symbol) == "i"}
    return bool(units) and bool(simplify((expected - given).doit().subs(units)) == 0)
