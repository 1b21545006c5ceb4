r"""Tells expressions apart by their values, so that most wrong answers need no computer algebra.

Two expressions that differ at one point are different; numbers without roots are compared exactly. Both are evaluated at a
point where every variable has its own number; a difference larger than rounding could cause settles the matter, and agreement
leaves it to computer algebra. Reads integers, letters, ``\pi``, ``\frac``, ``\sqrt``, + − · / ^ and brackets; points such as
``(1, \frac{\pi}{2})`` coordinate by coordinate; ``y = 2x`` by its right-hand side. Does not read whatever math-verify may
read differently than LaTeX means it or than other readers do: ``1/2x``, ``3(4)``, ``2^3^4``, ``2\frac13``, ``f(x)``, ``5m``
(a unit?), the letters d, e, i.
"""

from __future__ import annotations

import contextlib
import decimal
import functools
import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from math import comb, factorial
from typing import Any

from nft_megatron.verify.numbers import tight

_MAX_CHARS = 200
_CONTEXT = decimal.Context(prec=80, traps=[decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow])
# Nothing is decided beyond these limits; within them rounding stays far below _DIFFERENCE.
_LARGEST, _SMALLEST_DIVISOR, _LARGEST_EXPONENT = Decimal("1e20"), Decimal("1e-6"), Decimal(32)
_DIFFERENCE, _RELATIVE_DIFFERENCE = Decimal("1e-20"), Decimal("1e-9")

_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
_LETTERS = "abcfghjklmnopqrstuvwxyz"
_POINT = {letter: (Decimal(index + 2).sqrt(_CONTEXT) % 1) + 1 for index, letter in enumerate(_LETTERS)}  # all within 1 and 2

_LARGEST_FACTORIAL = 3000
_MAX_BITS = 50_000  # of an exact number: enough for 2000! and 3^{10000}

_REMEMBERED = 4096  # values and letters of expressions: a gold meets the answers of its group
_TOKEN = re.compile(r"([0-9]+)|([A-Za-z])|\\([A-Za-z]+)\s*|([-+*/^(){}!])")
_RATIONAL = re.compile(r"[0-9]+|[-+*/^(){}!]|\\(?:frac|binom|cdot|times)")
_SHORT_FRACTION = [
    (re.compile(r"\\frac\s*([0-9A-Za-z])\s*([0-9A-Za-z])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*([0-9A-Za-z])\s*\{"), r"\\frac{\1}{"),
]
_COMMAND = re.compile(r"\\[A-Za-z]+")
_LETTER = re.compile("[a-z]")
_NAMED = re.compile("[A-Za-z]=")
_NO_LETTER = re.compile("[^A-Za-z]")
# Trailing letters after a digit or a brace may be a unit, unless they are these.
_UNIT = re.compile(r"[0-9}\s](?!(?:[abruvw]|[knpqxyz]+)$)[A-Za-z]+$")
_PRODUCT = {"*", r"\cdot", r"\times"}
# Neighbours that need not be a product: f(x), \pi^f(x), \frac{1}{2}(x), 2\frac13.
_AMBIGUOUS = {("letter", "("), ("fraction", "("), ("root", "("), ("number", r"\frac"), ("number", r"\binom")}


class _Unreadable(Exception):
    """The expression has no value here."""


Value = Decimal | Fraction
"""A fraction where the expression is a rational number: exact, however large or small."""


def differ(answer: str, gold: str) -> bool:
    r"""Whether ``answer`` and ``gold`` certainly have different values; False says nothing.

    >>> differ("(x-2)^2", "x^2-4"), differ("(x-2)(x+2)", "x^2-4"), differ(r"\frac{\sqrt3}{2}", r"\frac{\sqrt2}{2}")
    (True, False, True)
    >>> differ(r"(1, \pi)", r"(1, \frac{\pi}{2})"), differ("y=2x", "y=3x"), differ("(1, 2)", "[1, 2]"), differ("0.3", "1/3")
    (True, True, False, False)
    """
    return same_value(answer, gold) is False


def same_value(answer: str, gold: str) -> bool | None:
    r"""Whether the values are the same; None if that is not certain, as agreement of anything but two rational numbers.

    >>> same_value("2^{10}", "1024"), same_value(r"\frac{1}{31!}", r"\frac{1}{33!}"), same_value(r"\sqrt{4}", "2")
    (True, False, None)
    """
    if _letters(answer) != _letters(gold):
        return None
    (form, parts), (gold_form, gold_parts) = _parts(tight(answer)), _parts(tight(gold))
    if form != gold_form or len(parts) != len(gold_parts):
        return None
    comparisons = [_compare_values(part, gold_part) for part, gold_part in zip(parts, gold_parts, strict=True)]
    return False if False in comparisons else None if None in comparisons else True


@functools.lru_cache(_REMEMBERED)
def value_of(text: str) -> Value | None:
    r"""The value of an expression in which each variable has its own number; None if it cannot be read unambiguously.

    >>> value_of(r"\frac{3}{4}-2^{-2}"), value_of("1/2x"), value_of("3(4)"), value_of("5m")
    (Fraction(1, 2), None, None, None)
    """
    text = tight(text)
    if len(text) > _MAX_CHARS or _UNIT.search(text) or not _NO_LETTER.search(text):
        return None
    for pattern, spelling in _SHORT_FRACTION if r"\frac" in text else ():
        text = pattern.sub(spelling, text)
    tokens = [token.group() for token in _TOKEN.finditer(text)]
    if sum(map(len, tokens)) != len(text):  # something else between them
        return None
    tokens = [token.strip() for token in tokens]
    kinds: list[type[Value]] = [Fraction, Decimal] if all(map(_RATIONAL.fullmatch, tokens)) else [Decimal]
    with decimal.localcontext(_CONTEXT):
        for kind in kinds:
            with contextlib.suppress(_Unreadable, decimal.DecimalException):
                reader = _Reader(tokens, kind)
                value = reader.sum()
                if reader.is_at_end:
                    return value
    return None


def _compare_values(answer: str, gold: str) -> bool | None:
    value, gold_value = value_of(answer), value_of(gold)
    if isinstance(value, Fraction) and isinstance(gold_value, Fraction):
        return value == gold_value
    if value is None or gold_value is None:
        return None
    with decimal.localcontext(_CONTEXT):
        try:
            first, second = _decimal(value), _decimal(gold_value)
        except (_Unreadable, decimal.DecimalException):
            return None
        difference = abs(first - second)
        return False if difference > max(_DIFFERENCE, _RELATIVE_DIFFERENCE * max(abs(first), abs(second))) else None


def _decimal(value: Value) -> Decimal:
    if isinstance(value, Decimal):
        return value
    return _quotient(_bounded(Decimal(value.numerator)), _bounded(Decimal(value.denominator)))


@functools.lru_cache(_REMEMBERED)
def _letters(text: str) -> frozenset[str]:
    """The variables, without commands, in lower case as math-verify reads them."""
    return frozenset(_LETTER.findall(_COMMAND.sub("", text).lower()))


def _parts(text: str) -> tuple[str, list[str]]:
    """The coordinates of ``(a,b)`` with "()", the b of ``y=b`` with "y="; any other text unchanged, with "".

    ``(a,b]`` is not a point: to math-verify all empty intervals of that kind are equal.
    """
    if _NAMED.match(text):
        return text[:2].lower(), [text[2:]]
    if text[:1] + text[-1:] not in ("()", "[]") or "," not in text:
        return "", [text]
    parts, depth = [""], 0
    for symbol in text[1:-1]:
        depth += (symbol in "({[") - (symbol in ")}]")
        if depth < 0:  # "(1,2)(3,4)"
            return "", [text]
        if symbol == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += symbol
    return text[0] + text[-1], parts


class _Reader:
    """Reads and evaluates tokens from left to right, with one method per level of precedence."""

    def __init__(self, tokens: Sequence[str], kind: type[Value]) -> None:
        self._tokens, self._kind, self._position = [*tokens, ""], kind, 0

    @property
    def is_at_end(self) -> bool:
        return not self._next

    def sum(self) -> Any:
        sign = self._take() if self._next in ("+", "-") else "+"
        value = self._product() if sign == "+" else -self._product()
        while self._next in ("+", "-"):
            value = value + self._product() if self._take() == "+" else value - self._product()
        return _bounded(value)

    def _product(self) -> Any:
        value, kind = self._power()
        while True:
            if self._next in _PRODUCT:
                self._take()
                factor, kind = self._power()
                value *= factor
            elif self._next == "/":
                self._take()
                divisor, kind = self._power()
                if self._starts_factor:
                    raise _Unreadable("a/bc: is c above or below?")
                value = _quotient(value, divisor)
            elif self._starts_factor:
                before, kind_before = self._next, kind
                factor, kind = self._power()
                if kind == "number" or (kind_before, before) in _AMBIGUOUS:
                    raise _Unreadable("3(4), f(x), 2 1/3")
                value *= factor
            else:
                return value

    def _power(self) -> tuple[Any, str]:
        """A value and its kind: number (also one in brackets), letter, group (in brackets), fraction or root."""
        base, kind = self._atom()
        if self._next == "!":
            self._take()
            base = self._kind(factorial(_count(base)))
        if self._next != "^":
            return base, kind
        self._take()
        exponent = self._short_argument()
        if self._next in ("^", "!"):
            raise _Unreadable
        if isinstance(base, Fraction):
            return _exact_power(base, exponent), kind
        if abs(exponent) > _LARGEST_EXPONENT or (base <= 0 and exponent != exponent.to_integral_value()):
            raise _Unreadable
        if exponent < 0:
            return _quotient(Decimal(1), _bounded(base**-exponent)), kind
        return _bounded(base**exponent), kind

    def _atom(self) -> tuple[Any, str]:
        token = self._take()
        if token.isdigit():
            return _bounded(self._kind(token)), "number"
        if token.lower() in _POINT:
            return _POINT[token.lower()], "letter"
        if token == "(":
            start = self._position
            value = self.sum()
            self._expect(")")
            has_name = any(token.isalpha() or token == r"\pi" for token in self._tokens[start : self._position])
            return value, "group" if has_name else "number"
        if token == r"\pi":
            return _PI, "letter"
        if token == r"\frac":
            above = self._braces()
            return _quotient(above, self._braces()), "fraction"
        if token == r"\binom":
            above, below = _count(self._braces()), _count(self._braces())
            return self._kind(comb(above, below)), "fraction"
        if token == r"\sqrt":
            return self._short_argument().sqrt(), "root"
        raise _Unreadable(token)

    def _short_argument(self) -> Any:
        r"""Of ``^`` or ``\sqrt``: one digit, one letter, or what is in braces; not the 23 of ``x^23``."""
        if self._next == "{":
            return self._braces()
        if len(self._next) != 1 or self._next == "(":
            raise _Unreadable(self._next)
        return self._atom()[0]

    def _braces(self) -> Any:
        self._expect("{")
        value = self.sum()
        self._expect("}")
        return value

    @property
    def _next(self) -> str:
        return self._tokens[self._position]

    @property
    def _starts_factor(self) -> bool:
        return self._next not in ("", "+", "-", "*", "/", "^", ")", "}", *_PRODUCT)

    def _take(self) -> str:
        token = self._tokens[self._position]
        if not token:
            raise _Unreadable("ends too early")
        self._position += 1
        return token

    def _expect(self, token: str) -> None:
        if self._take() != token:
            raise _Unreadable(f"no {token}")


def _bounded(value: Any) -> Any:
    if isinstance(value, Fraction):
        is_small = max(value.numerator.bit_length(), value.denominator.bit_length()) <= _MAX_BITS
    else:
        is_small = abs(value) <= _LARGEST
    if not is_small:
        raise _Unreadable("too large")
    return value


def _quotient(above: Any, below: Any) -> Any:
    if abs(below) < (_SMALLEST_DIVISOR if isinstance(below, Decimal) else Fraction(1, 2**_MAX_BITS)):
        raise _Unreadable("almost 0 below")
    return _bounded(above / below)


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or abs(exponent) * bits > _MAX_BITS or (base == 0 and exponent <= 0):
        raise _Unreadable("no rational power, or a huge one")
    return base ** int(exponent)


def _count(value: Any) -> int:
    if value != int(value) or not 0 <= value <= _LARGEST_FACTORIAL:
        raise _Unreadable("no factorial")
    return int(value)
