r"""Reads exact numbers from LaTeX and rejects whatever could mean something else.

``12\,345``, ``\text{34}``, ``n = 75``, ``\frac{160}{2}``, ``30^\circ`` and ``\$78`` are numbers. ``34\%`` (is it 0.34?),
``40_9`` (a base), ``1, 234`` (a list), ``\pm 3``, ``5 \text{ million}`` and ``1 = 34`` are not.
"""

from __future__ import annotations

import re
from fractions import Fraction

_FONTS = r"\\(?:text|textbf|textit|textrm|textnormal|mathbf|mathrm|mathit|mathbb|mbox|boldsymbol|bm)\s*"
_GROUP = r"\{((?:[^{}]|\{[^{}]*\})*)\}"

# One spelling for the same meaning, applied in this order.
_RESPELL = [
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])"), ""),
    (re.compile(r",\s*\\!\s*|\\!\s*,\s*|\{\s*,\s*\}"), ","),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\[,;: ]|\\thinspace(?![A-Za-z])|[~\s\u2009\u202f\u00a0]"), " "),
]
_LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")
# What may surround a number without changing it: math mode, fonts, one pair of brackets, a full stop, a currency.
_WRAPPERS = [
    re.compile(r"\$+([^$]*)\$+"),
    re.compile(r"\\\((.*)\\\)|\\\[(.*)\\\]"),
    re.compile(_FONTS + _GROUP),
    re.compile(_GROUP),
    re.compile(r"\(([^()]*)\)"),
    re.compile(r"(.*[^.])\."),
    re.compile(r"(?:\\\$|[£€])(.*)"),
]
_DEGREE = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|°|\\degree)$")
_TEXT_UNIT = re.compile(r"\s*" + _FONTS + r"\{([A-Za-z .,/^23²³()-]*)\}(?:\s*\^\s*\{?[23]\}?)?$")
_BARE_UNIT = re.compile(
    r"\s*(?:[ckm]m|kg|degrees?|units?|ways|dollars?|cents?|hours?|minutes?|seconds?|days?|years?|feet|inches|meters?|miles)"
    r"(?:\s*\^\s*\{?[23]\}?)?$"
)
# Words that make "5 \text{ …}" something other than the number 5, and single letters that are not units.
_NOT_UNIT = re.compile(
    r"(?i:\b(?:percent|pct|hundred|thousand|million|billion|trillion|dozen|or|and|not|mod|modulo|base|at|most|least|more|less|"
    r"fewer|about|approx|approximately|around|factorial|squared|cubed|times|over|to|plus|minus|pi|half|halves|thirds?|"
    r"quarters?|tenths|hundredths|thousandths|point|i+|iv)\b)|\b[^ACFJKLNVWghlms\W]\b"
)

_MAX_DIGITS = 4000  # Python does not parse integers of more than 4300
_DIGITS = r"(?:[0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]{0,2}(?: [0-9]{3})+)"
_DECIMAL = re.compile(rf"([+-]?)\s*({_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)")
_FRACTION = re.compile(r"([+-]?)\s*\\frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")

# An "=" after one of these does not assign a value to what precedes it.
_NOT_IN_NAMES = re.compile(
    r"[,;:<>!≤≥≈≠±]|\\(?:n?[lg]eq?|neq?|[lg]t|approx|sim|simeq|equiv|cong|pm|mp|in|quad|qquad|to|rightarrow)(?![A-Za-z])"
)
_ARITHMETIC = re.compile(r"(?:[0-9.+*/^!(){} -]|\\(?:frac|sqrt(?:\s*\[[0-9]+\])?|cdot|times|div|[dt]?binom)(?![A-Za-z]))+")


def read_bare_number(text: str) -> Fraction | None:
    r"""The number that ``text`` states without a unit; None if it is anything else.

    >>> read_bare_number(r"\textbf{(12\,345) }"), read_bare_number(r"-\frac{6}{4}"), read_bare_number("1,22")
    (Fraction(12345, 1), Fraction(-3, 2), None)
    """
    if text.isascii() and text.isdigit() and len(text) < _MAX_DIGITS:  # nearly all of them
        return Fraction(int(text))
    text = _peel(_respell(text))
    if (value := _decimal(text)) is not None:
        return value
    if match := _FRACTION.fullmatch(text):
        sign, above, below = match[1], match[2] or match[3], match[4] or match[5]
    else:
        sign, (above, _, below) = "", text.partition("/")
    top, bottom = _decimal(above or ""), _decimal(below or "")
    if top is None or not bottom:
        return None
    return -top / bottom if sign == "-" else top / bottom


def read_number(text: str) -> Fraction | None:
    r"""Like :func:`read_bare_number`, but a degree sign or a unit may follow.

    >>> read_number(r"15\mbox{ cm}^2"), read_number(r"120^\circ"), read_number(r"5 \text{ million}"), read_number(r"7\%")
    (Fraction(15, 1), Fraction(120, 1), None, None)
    """
    if text.isdigit():
        return read_bare_number(text)
    text = _peel(_respell(text))
    for unit in (_TEXT_UNIT, _BARE_UNIT, _DEGREE):
        match = unit.search(text)
        if match and not (unit is _TEXT_UNIT and _NOT_UNIT.search(match[1])):
            text = text[: match.start()]
    return read_bare_number(text)


def stated_part(text: str) -> str:
    r"""The value in ``name = value`` or ``name = arithmetic = value``; any other text unchanged.

    >>> stated_part("n = 75"), stated_part("m+n = 30+4 = 34"), stated_part("1 = 34"), stated_part(r"x = 2 \text{ or } x = 3")
    ('75', '34', '1 = 34', 'x = 2 \\text{ or } x = 3')
    """
    if "=" not in text:
        return text
    name, *values = (side.strip() for side in _peel(_respell(text)).split("="))
    if not values or not _is_name(name):
        return text
    numbers = [read_number(value) for value in values]
    if any(number is None and not is_arithmetic(value) for number, value in zip(numbers, values, strict=True)):
        return text
    known = {number for number in numbers if number is not None}
    return values[-1] if len(known) <= 1 else text


def is_arithmetic(text: str) -> bool:
    r"""Whether ``text`` consists only of numbers, + − · / ^ !, fractions, roots and binomials.

    >>> is_arithmetic(r"2^{10}-\binom{5}{2}"), is_arithmetic("2k+2"), is_arithmetic("3 4"), is_arithmetic(r"\{3\}")
    (True, False, False, False)
    """
    text = _peel(_respell(text))
    return _ARITHMETIC.fullmatch(text) is not None and re.search(r"[0-9]\s+[0-9]", text) is None


def same_spelling(text: str, other: str) -> bool:
    r"""Whether two pieces of LaTeX differ only in spacing, ``\left``, ``\dfrac`` and the like.

    >>> same_spelling(r"\left( 2n - 1,\, \dfrac12 \right)", r"(2n-1, \frac12)"), same_spelling("3 4", "34")
    (True, False)
    """
    return tight(text) == tight(other)


def tight(text: str) -> str:
    """``text`` without spaces next to a symbol; those between letters or digits may mean something."""
    return _LOOSE_SPACE.sub("", _respell(text))


def _decimal(text: str) -> Fraction | None:
    match = _DECIMAL.fullmatch(text.strip()) if len(text) < _MAX_DIGITS else None
    return Fraction(match[1] + re.sub("[ ,]", "", match[2])) if match else None


def _respell(text: str) -> str:
    for pattern, spelling in _RESPELL:
        text = pattern.sub(spelling, text)
    return text.strip()


def _peel(text: str) -> str:
    """``text`` without whatever may surround a number."""
    while match := next(filter(None, (wrapper.fullmatch(text) for wrapper in _WRAPPERS)), None):
        text = next(inside for inside in match.groups() if inside is not None).strip()
    return text


def _is_name(text: str) -> bool:
    r"""Whether ``text`` may name a quantity: ``x``, ``m+n``, ``f(1,2)``, ``\angle ABC``, ``\text{Total}``."""
    outside_brackets = re.sub(r"\([^()]*\)", "", text)
    return bool(re.search("[A-Za-z]", text)) and not is_arithmetic(text) and not _NOT_IN_NAMES.search(outside_brackets)
