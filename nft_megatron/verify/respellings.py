r"""Other spellings of a gold with exactly its meaning, to find out whether a verifier reads what models write. Pure functions.

A verifier that accepts ``\frac{3}{4}`` beside itself may still refuse ``0.75``, and the question would then be trained as wrong
whenever a model prefers decimals.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

from nft_megatron.verify.numbers import read_bare_number

_MAX_DECIMALS = 30

_TEXT = re.compile(
    r"(\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox|operatorname|begin|end)\s*+\{[^{}]*+\}|[A-Za-z]{2,}(?:-[A-Za-z]++)++)"
)
# A sign between two terms, but not the one of 1e-07.
_BINARY = re.compile(r"(?<=[0-9A-Za-z)}\]|])(?<![0-9.][eE])\s*+([-+=<>])\s*+(?=[^\s=<>])")
_COMMA = re.compile(r"(?<=[^\s{])(,)(?=[^\s!}])(?![0-9]{3}(?![0-9]))")
_BEFORE_COMMAND = re.compile(r"(?<=[0-9}])(\\[A-Za-z])")

_FRAC = re.compile(r"\\[dt]?frac(?![A-Za-z])")
_ATOM = r"(?:[0-9]++(?:\.[0-9]++)?+|[A-Za-z]|\\(?:pi|theta|alpha|beta|lambda|mu)(?![A-Za-z]))"
_FACTOR = rf"(?:{_ATOM}|\\sqrt\s*+(?:\[[0-9]++\])?+(?:\{{{_ATOM}\}}|[0-9]))"
_SINGLE = re.compile(_ATOM)
_PRODUCT = re.compile(rf"{_FACTOR}++")
_FREE_BEFORE = re.compile(
    r"(?:^|[(\[,{=<>;&]|\\(?:left\s*+[(\[]|text\s*+\{\s*+(?:or|and)\s*+\}|pm|cup)|\\\{)\s*+[-+]?+\s*+$|[-+]\s*+$"
)
_FREE_AFTER = re.compile(r"\s*+(?:$|[)\],}=<>;&]|[-+]|\\(?:right|text|cup|pm|\}|\\))")
_MIXED_BEFORE = re.compile(r"(?:^|[(,\[])\s*+-?[0-9]++$")
_DIFFERENTIAL = re.compile(r"d(?:\^\{?[0-9]\}?)?\s*+[A-Za-z]")
_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2}")
_SLASH = re.compile(r"(?<![\w/.,}])([0-9]++)/([0-9]++)(?![\w/.,^({!])")

_PAIRS = {"(": ")", "[": "]", r"\{": r"\}"}
_BRACKET = re.compile(r"\\sqrt\s*+\[[^\[\]]*+\]|\\\\\[[^\[\]]*+\]|\\[{}]|[()\[\]]")
_LEFT_RIGHT = re.compile(r"\\(?:left|right)(?![A-Za-z])\s*+(?!\.)")
_NO_VALUE = re.compile(
    r"[,=<>%:;&|~_$]|\\(?!frac|dfrac|tfrac|sqrt|pi|cdot|times|left|right)[A-Za-z]|(?<![\\A-Za-z])[A-Za-z]{2}|\\[^A-Za-z]"
)
_WORD = re.compile(r"[A-Z]|[A-Za-z]{2,}")
_ONLY_TEXT = re.compile(r"\\text\s*+\{([A-Za-z0-9 .]++)\}")
_PLAIN_NUMBER = re.compile(r"-?[0-9]++(?:\.[0-9]++)?+")
_NUMBER = re.compile(r"[-+0-9.,/{}() eE]++|[-+]?\s*+[0-9]*+\s*+\\[dt]?frac[0-9{} -]++")


def respellings(gold: str) -> dict[str, str]:
    r"""Spellings of ``gold`` with the same meaning, by their kind; a kind that would change nothing or the meaning is absent.

    >>> respellings(r"\frac{\pi}{4}")
    {'dfrac': '\\dfrac{\\pi}{4}', 'slash': '\\pi/4', 'brackets': '\\left(\\frac{\\pi}{4}\\right)'}
    >>> respellings("4.5e33")["times"], respellings("x^2+1")["spaces"], respellings("(0,1]")["brackets"]
    ('4.5 \\times 10^{33}', 'x^2 + 1', '\\left(0,1\\right]')
    >>> respellings("Evelyn"), respellings(r"\text{(B)}")
    ({'text': '\\text{Evelyn}'}, {})
    """
    gold = gold.strip()
    number = read_bare_number(gold) if _NUMBER.fullmatch(gold) and not gold.startswith("(") else None
    found = {kind: spell(gold) for kind, spell in _SPELLINGS.items()}
    if number is not None:
        found |= _numbers(gold, number)
    return {kind: text for kind, text in found.items() if text and text != gold}


def _spaces(gold: str) -> str:
    """Spaces around signs and after commas; none around signs where there are some."""
    loose = _outside_text(gold, lambda part: _COMMA.sub(r"\1 ", _BINARY.sub(r" \1 ", part)))
    loose = _BEFORE_COMMAND.sub(r" \1", loose)
    return loose if loose != gold else _outside_text(gold, lambda part: _BINARY.sub(r"\1", part))


def _outside_text(gold: str, change: Callable[[str], str]) -> str:
    """``gold`` with what is not in ``\\text{}`` changed."""
    return "".join(part if index % 2 else change(part) for index, part in enumerate(_TEXT.split(gold)))


def _dfrac(gold: str) -> str:
    return _FRAC.sub(lambda found: r"\dfrac" if found.group() == r"\frac" else r"\frac", gold)


def _slash(gold: str) -> str:
    r"""``a/b`` for ``\frac{a}{b}`` where nothing beside it could be drawn below the line, and the reverse for numbers."""
    text, end = "", 0
    while found := _FRAC.search(gold, end):
        above, below = _argument(gold, found.end()), None
        below = _argument(gold, above[1]) if above else None
        before = text + gold[end : found.start()]
        if above is None or below is None:
            return ""
        top, bottom = above[0].strip(), below[0].strip()
        is_mixed = top.isdigit() and bottom.isdigit() and _MIXED_BEFORE.search(before) is not None
        if _DIFFERENTIAL.match(top) and _DIFFERENTIAL.match(bottom):
            return ""
        if (is_mixed or _FREE_BEFORE.search(before)) and _FREE_AFTER.match(gold, below[1]) and not _FRAC.search(top + bottom):
            space = " " if is_mixed else ""
            top = top if _PRODUCT.fullmatch(top) else f"({top})"
            bottom = bottom if _SINGLE.fullmatch(bottom) else f"({bottom})"
            text = f"{before}{space}{top}/{bottom}"
        else:
            text = before + gold[found.start() : below[1]]
        end = below[1]
    text += gold[end:]
    return text if text != gold or _WORDS.search(gold) else _SLASH.sub(r"\\frac{\1}{\2}", gold)


def _argument(text: str, start: int) -> tuple[str, int] | None:
    r"""The argument of a command at ``text[start:]`` and where it ends: one character, or what is in braces."""
    while text[start : start + 1] == " ":
        start += 1
    if text[start : start + 1] != "{":
        return (text[start], start + 1) if text[start : start + 1].isalnum() else None
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return text[start + 1 : position], position + 1
    return None


def _brackets(gold: str) -> str:
    r"""Brackets with ``\left`` and ``\right``, or without; around a value that has none."""
    if r"\left" in gold:
        return _LEFT_RIGHT.sub("", gold)
    if not any(bracket in gold for bracket in _PAIRS) and "!" not in gold:
        return "" if _NO_VALUE.search(gold) else rf"\left({gold}\right)"
    text, end, opened = "", 0, 0
    for found in _BRACKET.finditer(gold):
        symbol = found.group()
        is_opening, is_closing = symbol in _PAIRS, symbol in _PAIRS.values()
        opened += is_opening - is_closing
        if opened < 0:
            return ""
        text += gold[end : found.start()] + (r"\left" if is_opening else r"\right" if is_closing else "") + symbol
        end = found.end()
    return text + gold[end:] if not opened and not _TEXT.search(gold) else ""


def _text(gold: str) -> str:
    if inside := _ONLY_TEXT.fullmatch(gold):
        return inside[1].strip()
    return rf"\text{{{gold}}}" if _WORD.fullmatch(gold) or _PLAIN_NUMBER.fullmatch(gold) else ""


def _numbers(gold: str, number: Fraction) -> dict[str, str]:
    """The exact decimal, the fraction of a decimal, and the number with a power of ten."""
    fraction = ""
    if number.denominator > 1 and "." in gold:
        fraction = rf"{'-' if number < 0 else ''}\frac{{{abs(number.numerator)}}}{{{number.denominator}}}"
    exact = _exact_decimal(number)
    if exact is None or len(exact) > _MAX_DECIMALS:
        return {"fraction": fraction, **_powers(number, gold)}
    decimal = exact if "." in exact else f"{exact}.0"
    return {"fraction": fraction, "decimal": decimal, **_powers(number, gold)}


def _exact_decimal(number: Fraction) -> str | None:
    """All digits of ``number``; None if they never end."""
    rest, places = number.denominator, 0
    for prime in (2, 5):
        power = 0
        while rest % prime == 0:
            rest, power = rest // prime, power + 1
        places = max(places, power)
    if rest != 1:
        return None
    return f"{Decimal(int(number * 10**places)).scaleb(-places):f}" if places else str(number.numerator)


def _powers(number: Fraction, gold: str) -> dict[str, str]:
    exact = _exact_decimal(number)
    if exact is None or not number:
        return {}
    digits = exact.replace("-", "").replace(".", "")
    exponent = len(exact.replace("-", "").partition(".")[0]) - 1 - (len(digits) - len(digits.lstrip("0")))
    digits = digits.strip("0")
    if not exponent or len(digits) > _MAX_DECIMALS:
        return {}
    mantissa = ("-" if number < 0 else "") + digits[0] + ("." + digits[1:] if digits[1:] else "")
    powers = {"times": rf"{mantissa} \times 10^{{{exponent}}}", "cdot": rf"{mantissa} \cdot 10^{{{exponent}}}"}
    if digits == "1" and number > 0:
        powers["power"] = f"10^{{{exponent}}}"
    return powers | ({} if "e" in gold.lower() else {"e": f"{mantissa}e{exponent}"})


_SPELLINGS: dict[str, Callable[[str], str]] = {
    "spaces": _spaces,
    "dfrac": _dfrac,
    "slash": _slash,
    "brackets": _brackets,
    "text": _text,
}
