r"""Reads a gold, whatever a data set has in its place: text, a number, a list, or a whole solution that ends in the answer.

| in the data set | gold |
|---|---|
| ``Add: 1+1=<<1+1=2>>2\n#### 2`` (GSM8K) | what follows ``####`` on the last line; a line "The answer is …" may follow |
| ``Adding gives \boxed{2}.`` | the content of the last box; several boxes of one sentence become a list |
| ``27.0`` and ``1e-07``, as numbers | ``27`` and ``0.0000001`` |
| ``["1", "2"]``, also as text | ``1, 2`` |

NaN, infinity, null (also inside a list), a box that is not closed, and anything else are refused. Other text is the gold as it
is.
"""

from __future__ import annotations

import ast
import contextlib
import math
import re
import unicodedata
from decimal import Decimal
from typing import Any

from nft_megatron.verify.boxes import gold_in_boxes

_NOT_A_VALUE = ("nan", "<na>", "nat", "null", "n/a", "#n/a", "[]")
"""Lower case: what is left of a missing value once a program has written it as text. "None" and "inf" may be answers."""
_LAST_HASHES = re.compile(r"(?:^|\s)####[^\S\n]*+([^\n#]*+)(?:\n\s*+(?:the )?(?:final )?answer\b[^\n]*+)?\s*+$", re.IGNORECASE)
_INVISIBLE = ("Zs", "Zl", "Zp", "Cc", "Cf")
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")
_TEXTS_IN_BRACKETS = re.compile(rf"\[\s*(?:{_QUOTED.pattern})(?:\s*,\s*(?:{_QUOTED.pattern}))*\s*\]")
_OPEN_BOX = re.compile(r"\\f?boxed\s*\{")
_ONE_EXPRESSION = re.compile(r"\\begin\{|^\s*(?:\$\$|\\\[).*(?:\$\$|\\\])\s*$", re.DOTALL)
_MANY_WORDS = re.compile(r"(?:(?<![\\A-Za-z])[A-Za-z]{2,}+\b\W*+){16}")


class GoldError(ValueError):
    """The value is no gold. The message continues "the gold …"."""


def read_gold(value: Any) -> str:
    r"""The gold as text without surrounding whitespace; empty when there is none. Raises :class:`GoldError`.

    >>> read_gold("Add: 1+1=<<1+1=2>>2\n#### 2"), read_gold(r"Adding gives $\boxed{2}$."), read_gold(27.0), read_gold(1e-07)
    ('2', '2', '27', '0.0000001')
    >>> read_gold(float("nan"))
    Traceback (most recent call last):
    nft_megatron.data.golds.GoldError: is not a number (nan)
    """
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        if any(item is None for item in value):
            raise GoldError(f"has a null in its list: {list(value)!r}"[:200])
        items = [read_gold(item) for item in value]
        if not all(items) and items:
            raise GoldError(f"has an empty text in its list: {list(value)!r}"[:200])
        return ", ".join(items)
    if isinstance(value, (float, Decimal)):
        return _decimal(value)
    if isinstance(value, (str, int)):
        return _from_text(str(value))
    raise GoldError(f"is neither text nor a number but {type(value).__name__}: {value!r}"[:200])


def _decimal(value: float | Decimal) -> str:
    """All digits, without an exponent and without a fraction of zeros."""
    if not math.isfinite(value):
        raise GoldError(f"is {'not a number' if math.isnan(value) else 'infinite'} ({value})")
    text = format(Decimal(repr(value)) if isinstance(value, float) else value, "f")
    if "." in text:
        whole, _, digits = text.partition(".")
        text = whole if not digits.strip("0") else text
    return "0" if text == "-0" else text


def _from_text(text: str) -> str:
    text = text.strip()
    if is_blank(text):
        return ""
    if is_missing(text):
        raise GoldError(f"is a missing value, written as the text {text!r}")
    if _TEXTS_IN_BRACKETS.fullmatch(text):
        return read_gold(_listed(text))
    if marked := _LAST_HASHES.search(text):
        text = marked[1].strip()
        if not text:
            raise GoldError("has no answer after its last '####'")
    inside = gold_in_boxes(text)
    if inside != text:
        if not all(item.strip() for item in inside.split(",")):
            raise GoldError("has an empty box")
        text = inside
    elif _OPEN_BOX.search(text):
        raise GoldError(f"has a box that is not closed: {text!r}"[:200])
    return text


def _listed(text: str) -> list[str]:
    r"""The texts in a list that was written as text: as JSON or Python, or with the backslashes of LaTeX as they are.

    >>> _listed(r'["\\frac{1}{2}"]') == _listed(r'["\frac{1}{2}"]') == [r"\frac{1}{2}"]
    True
    """
    with contextlib.suppress(ValueError, SyntaxError):
        items: list[str] = ast.literal_eval(text)
        if not any(unicodedata.category(character) == "Cc" for item in items for character in item):
            return items
    return [item[1:-1] for item in _QUOTED.findall(text)]


def is_blank(text: str) -> bool:
    """Whether nothing of ``text`` can be seen.

    >>> is_blank(" \\u200b\\n"), is_blank("0")
    (True, False)
    """
    return all(unicodedata.category(character) in _INVISIBLE for character in text)


def is_missing(text: str) -> bool:
    """Whether ``text`` is what programs write where a value is missing.

    >>> is_missing("NaN"), is_missing("None")
    (True, False)
    """
    return text.strip().lower() in _NOT_A_VALUE


def is_whole_text(gold: str) -> str:
    r"""Why no answer would be the same as ``gold``, although the verifier accepts it beside itself; empty when one may.

    >>> is_whole_text("Add one.\nThe answer is 2."), is_whole_text("\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}")
    ('several lines', '')
    """
    if len([line for line in gold.splitlines() if line.strip()]) > 1 and not _ONE_EXPRESSION.search(gold):
        return "several lines"
    return "a whole text" if _MANY_WORDS.search(gold) else ""
