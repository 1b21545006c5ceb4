r"""Reads exact numbers from LaTeX and rejects whatever could mean something else.

``12\,345``, ``\text{34}``, ``\frac{160}{2}``, ``3\frac14``, ``1.5e3``, ``0.\overline{3}`` and ``5 \text{ million}`` are
numbers, and so are ``30^\circ``, ``\$78`` and ``34\%`` with their units. ``40_9`` (a base), ``1, 234`` (a list), ``\pm 3``
and ``1 = 34`` are not.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

_FONTS = r"\\(?:text|textbf|textit|textrm|textnormal|mathbf|mathrm|mathit|mathbb|mbox|boldsymbol|bm)\s*"
_GROUP = r"\{((?:[^{}]|\{[^{}]*\})*)\}"

# One spelling for the same meaning, applied in this order.
_RESPELL = [
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])"), ""),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\langle(?![A-Za-z])"), "("),
    (re.compile(r"\\rangle(?![A-Za-z])"), ")"),
    (re.compile(r",\s*\\!\s*|\\!\s*,\s*|\{\s*,\s*\}"), ","),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\[,;: ]|\\thinspace(?![A-Za-z])|[~\s\u2009\u202f\u00a0]"), " "),
]
_SPELLED_OTHERWISE = re.compile(r"[\\\s~{−–]")
_LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z])\s++|\s++(?![0-9A-Za-z])|(?<=[0-9])\s++(?=[A-Za-z])")
# What may surround a number without changing it: math mode, fonts, one pair of brackets, a full stop, a currency.
_WRAPPERS = {
    "$": re.compile(r"\$++([^$]++)\$++"),
    "\\": re.compile(rf"\\\((.*)\\\)|\\\[(.*)\\\]|{_FONTS}{_GROUP}|\\\$(.*)"),
    "{": re.compile(_GROUP),
    "(": re.compile(r"\(([^()]*)\)"),
    "£": re.compile("£(.*)"),
    "€": re.compile("€(.*)"),
}
_FULL_STOP = re.compile(r"(.*[^.])\.")
_DEGREE = re.compile(r"(?:\^\s*+\{?\s*+\\circ\s*+\}?|°|\\degree)$")
_PERCENT = re.compile(r"\\?%$")
_TEXT_UNIT = re.compile(_FONTS + r"\{([A-Za-z .,/^23²³()-]*)\}(?:\s*\^\s*\{?[23]\}?)?$")
_BARE_UNIT = re.compile(
    r"(?<![A-Za-z])(?:[ckm]m|[km]g|ml|mL|ft|in|yd|mi|lbs?|oz|hrs?|mins?|secs?|mph|kph|km/h|m/s|USD|EUR|degrees?|percent(?:age)?|pct|units?|ways"
    r"|dollars?|cents?|euros?|pounds?|hours?|minutes?|seconds?|days?|weeks?|months?|years?|feet|foot|inch(?:es)?|yards?|miles?"
    r"|(?:kilo|centi|milli)?(?:meter|metre|gram|liter|litre)s?|gallons?|ounces?)(?:\s*\^\s*\{?[23]\}?)?$"
)
_MONEY = re.compile(r"(?:\\\$|[€£])$")
_ZEROS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(r"(?<=[0-9])\s*+(?:" + _FONTS + r"\{)?\s*+(" + "|".join(_ZEROS) + r")\s*+\}?$")
# Words that make "5 \text{ …}" something other than the number 5, and single letters that are not units.
_NOT_UNIT = re.compile(
    r"(?i:\b(?:hundred|thousand|million|billion|trillion|dozen|or|and|not|mod|modulo|base|at|most|least|more|less|"
    r"fewer|about|approx|approximately|around|factorial|squared|cubed|times|over|to|plus|minus|pi|half|halves|thirds?|"
    r"quarters?|tenths|hundredths|thousandths|point|i+|iv)\b)|\b[^ACFJKLNVWghlms\W]\b"
)

MAX_DIGITS = 4000  # Python does not parse integers of more than 4300
_DIGIT = re.compile("[0-9]")
_NO_UNIT_ENDS = tuple("0123456789)]!")
_DIGITS = r"(?:[0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]{0,2}(?: [0-9]{3})+)"
_DECIMAL = re.compile(rf"([+-]?)\s*({_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)")
_SCIENTIFIC = re.compile(
    r"([+-]?)\s*+(?:([0-9]++(?:\.[0-9]*+)?+|\.[0-9]++)"
    r"(?:[eE]([+-]?[0-9]{1,4}+)|\s*+(?:\\times|\\cdot|\*|x)\s*+10\s*+\^\s*+(?:([0-9])|\{\s*+([+-]?\s*+[0-9]{1,4}+)\s*+\}))"
    r"|10\s*+\^\s*+(?:([0-9])|\{\s*+([+-]?\s*+[0-9]{1,4}+)\s*+\}))"
)
_RECURRING = re.compile(
    r"([+-]?)\s*+([0-9]*+)\.([0-9]*+)(?:\\(?:overline|bar|dot)\s*+(?:\{\s*+([0-9]++)\s*+\}|([0-9]))|\(([0-9]++)\))"
)
# Three times the same digit, or twice the same digits, and dots.
_GOES_ON = re.compile(
    r"([+-]?)\s*+([0-9]*+)\.([0-9]*?)(?:([0-9])\4{2,}|([0-9]{2,6}?)\5+)\s*+(?:\\(?:[lc]?dots)(?![A-Za-z])|\.\.\.|…)"
)
_MAX_RECURRING = 100  # characters
_ATOM = r"[0-9]++|[A-Za-z](?![A-Za-z])|\\[A-Za-z]++(?![\[{A-Za-z])|\\sqrt\{[^{}]*+\}"
_SLASH = re.compile(
    rf"(?:(?<![A-Za-z0-9_^}}])\(([^()]++)\)|(?<![A-Za-z0-9_^}}).])({_ATOM}))/(?:\(([^()]++)\)|({_ATOM}))(?![A-Za-z0-9_^\\({{!])"
)
_MIXED = re.compile(
    r"([+-]?)\s*+([0-9]++)\s*+(?:\\frac\s*+(?:\{\s*+([0-9]++)\s*+\}|([0-9]))\s*+(?:\{\s*+([0-9]++)\s*+\}|([0-9]))|(?<=\s)([0-9]++)/([0-9]++))"
)
_FRACTION = re.compile(r"([+-]?)\s*\\frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")

_REMEMBERED = 4096  # readings of texts: a gold meets the answers of its group, and one comparison asks several times

_ARITHMETIC = re.compile(r"(?:[0-9.+*/^!(){} -]|\\(?:frac|sqrt(?:\s*\[[0-9]+\])?|cdot|times|div|[dt]?binom)(?![A-Za-z]))+")


def is_digits(text: str) -> bool:
    """Whether ``text`` is a whole number in plain digits, short enough for Python to parse."""
    return text.isdigit() and text.isascii() and len(text) < MAX_DIGITS


@functools.lru_cache(_REMEMBERED)
def read_bare_number(text: str) -> Fraction | None:
    r"""The number that ``text`` states without a unit; None if it is anything else.

    >>> read_bare_number(r"\textbf{(12\,345) }"), read_bare_number(r"-\frac{6}{4}"), read_bare_number("1,22")
    (Fraction(12345, 1), Fraction(-3, 2), None)
    """
    if is_digits(text):  # nearly all of them
        return Fraction(int(text))
    text = _peel(_respell(text))
    if not _DIGIT.search(text):
        return None
    for read in (_decimal, _mixed, _scientific, _recurring, _fraction):
        if (value := read(text)) is not None:
            return value
    return None


@functools.lru_cache(_REMEMBERED)
def read_number(text: str) -> Fraction | None:
    r"""Like :func:`read_bare_number`, but a degree sign, a percent sign or a unit may follow.

    >>> [read_number(text) for text in (r"15\mbox{ cm}^2", r"120^\circ", r"5 \text{ million}", r"5 \text{ or more}")]
    [Fraction(15, 1), Fraction(120, 1), Fraction(5000000, 1), None]
    """
    if is_digits(text):
        return Fraction(int(text))
    text = _peel(_respell(text))
    if text[-1:] in _NO_UNIT_ENDS and "^" not in text:
        return read_bare_number(text)
    if scale := _SCALE.search(text):
        number = read_bare_number(text[: scale.start()])
        return number * 10 ** _ZEROS[scale[1]] if number is not None else None
    for unit in (_DEGREE, _PERCENT, _MONEY, _TEXT_UNIT, _BARE_UNIT):
        match = unit.search(text)
        if match and not (unit is _TEXT_UNIT and _NOT_UNIT.search(match[1])):
            text = text[: match.start()]
    return read_bare_number(text)


def is_decimal(text: str) -> bool:
    """Whether ``text`` has a decimal point, but no recurring digits."""
    return "." in text.rstrip(".") and _recurring(_peel(_respell(text))) is None


def nearly_equal(number: Fraction, other: Fraction) -> bool:
    """Whether a decimal may be the rounded form of a fraction: the same to six places and to a relative 2e-6."""
    return abs(number - other) <= abs(other) * Fraction(2, 10**6) and round(number, 6) == round(other, 6)


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


def same_value_spelling(text: str, other: str) -> bool:
    r"""Like :func:`same_spelling`, but brackets around all of it do not count, and ``a/b`` is ``\frac{a}{b}``.

    >>> same_value_spelling(r"\left(6m\right)", "6m"), same_value_spelling("(K-1)/L", r"\frac{K-1}{L}")
    (True, True)
    """
    return _with_fractions(_without_brackets(tight(text))) == _with_fractions(_without_brackets(tight(other)))


def _without_brackets(text: str) -> str:
    if text[:1] != "(" or text[-1:] != ")" or "," in text:
        return text
    depth = 0
    for position, symbol in enumerate(text):
        depth += (symbol == "(") - (symbol == ")")
        if depth == 0:
            return text[1:-1] if position == len(text) - 1 else text
    return text


def _with_fractions(text: str) -> str:
    """Where nothing beside the slash could be meant to stand above or below it."""
    return _SLASH.sub(_as_fraction, text) if "/" in text else text


def _as_fraction(found: re.Match[str]) -> str:
    above, below = found[1] or found[2], found[3] or found[4]
    return rf"\frac{{{above}}}{{{below}}}"


@functools.lru_cache(_REMEMBERED)
def tight(text: str) -> str:
    """``text`` without spaces next to a symbol; those between letters or digits may mean something."""
    return _LOOSE_SPACE.sub("", _respell(text))


def _decimal(text: str) -> Fraction | None:
    match = _DECIMAL.fullmatch(text.strip()) if len(text) < MAX_DIGITS else None
    if match is None:
        return None
    whole, _, digits = match[2].replace(",", "").replace(" ", "").partition(".")
    value = Fraction(int(whole + digits), 10 ** len(digits)) if digits else Fraction(int(whole))
    return -value if match[1] == "-" else value


def _fraction(text: str) -> Fraction | None:
    r"""``\frac{160}{2}`` and ``160/2``."""
    if match := _FRACTION.fullmatch(text) if r"\frac" in text else None:
        sign, above, below = match[1], match[2] or match[3], match[4] or match[5]
    else:
        sign, (above, _, below) = "", text.partition("/")
    top, bottom = _decimal(above or "") if below else None, _decimal(below or "")
    if top is None or not bottom:
        return None
    return -top / bottom if sign == "-" else top / bottom


def _mixed(text: str) -> Fraction | None:
    r"""``3\frac14`` and ``3 1/4``, but not ``3\frac54``."""
    match = _MIXED.fullmatch(text) if (r"\frac" in text or "/" in text) and len(text) < MAX_DIGITS else None
    if match is None:
        return None
    whole, above, below = int(match[2]), int(match[3] or match[4] or match[7]), int(match[5] or match[6] or match[8])
    if not 0 < above < below:
        return None
    return (-1 if match[1] == "-" else 1) * (whole + Fraction(above, below))


def _scientific(text: str) -> Fraction | None:
    r"""``1.5e3``, ``1.5 \times 10^{3}`` and ``10^{-7}``, exactly."""
    match = _SCIENTIFIC.fullmatch(text) if ("^" in text or "e" in text or "E" in text) and len(text) < MAX_DIGITS else None
    if match is None:
        return None
    exponent = next(digits for digits in match.groups()[2:] if digits is not None)
    return Fraction(match[1] + (match[2] or "1")) * Fraction(10) ** int("".join(exponent.split()))


def _recurring(text: str) -> Fraction | None:
    r"""``0.1\overline{6}``, ``0.1\bar6``, ``0.1(6)`` and ``0.1666\ldots``."""
    match = (_RECURRING.fullmatch(text) or _GOES_ON.fullmatch(text)) if "." in text and len(text) < _MAX_RECURRING else None
    if match is None:
        return None
    sign, whole, before, *periods = match.groups()
    period = next(filter(None, periods))
    value = Fraction(int(whole + before + period) - int(whole + before or 0), 10 ** len(before) * (10 ** len(period) - 1))
    return -value if sign == "-" else value


@functools.lru_cache(_REMEMBERED)
def _respell(text: str) -> str:
    if not _SPELLED_OTHERWISE.search(text):
        return text
    for pattern, spelling in _RESPELL:
        text = pattern.sub(spelling, text)
    return text.strip()


def _peel(text: str) -> str:
    """``text`` without whatever may surround a number."""
    while True:
        wrapper = _WRAPPERS.get(text[:1])
        match = wrapper.fullmatch(text) if wrapper else None
        if match is None and text[-1:] == ".":
            match = _FULL_STOP.fullmatch(text)
        if match is None:
            return text
        text = next(inside for inside in match.groups() if inside is not None).strip()
