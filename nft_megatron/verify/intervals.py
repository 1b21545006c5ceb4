r"""Inequalities in one variable as intervals: ``2 \le x < 5`` is ``[2,5)``. Pure functions."""

from __future__ import annotations

import re

from nft_megatron.verify.numbers import tight

_SIGN = re.compile(r"<=|>=|<|>|\\(?:leqslant|geqslant|leq|geq|le|ge|lt|gt)(?![A-Za-z])")
_OR = re.compile(
    r"\\(?:text|mbox|mathrm|textrm)\s*+\{\s*+or\s*+\}|(?<![A-Za-z\\])or(?![A-Za-z])|\\(?:lor|vee)(?![A-Za-z])|\\cup(?![A-Za-z])"
)
_NAME = re.compile(r"(?:[A-Za-z]|\\[a-z]++)(?:_(?:[0-9A-Za-z]|\{[0-9A-Za-z]*+\}))?+")
_MEMBER = re.compile(r"\s*+(?:[A-Za-z]|\\[a-z]++)\s*+\\in(?![A-Za-z])\s*+(?=[\[(\\])")
_BOUND = r"((?:[^,=<>{}\\]|\\[A-Za-z]++|\{[^{}]*+\})++)"
_EXCEPT = re.compile(rf"([A-Za-z])\\neq?(?![A-Za-z])\s*+{_BOUND}|(?:[A-Za-z]\\in)?+\\mathbb\{{R\}}\\setminus\\\{{{_BOUND}\\\}}")
_INTERVAL = re.compile(r"[\[(][^\[\]=<>,]++,[^\[\]=<>,]++")
_LETTERS = re.compile(r"\\[A-Za-z]++|[A-Za-z]")


def is_interval(text: str) -> bool:
    r"""Whether ``text`` may be an interval or a union of some."""
    parts = [tight(part).strip() for part in text.split(r"\cup")]
    return all(part[-1:] in (")", "]") and _INTERVAL.fullmatch(part[:-1]) for part in parts)


def without_member(text: str) -> str:
    r"""``S`` for ``x \in S``."""
    return _MEMBER.sub("", text, count=1) if _MEMBER.match(text) else text


def as_interval(text: str) -> str | None:
    r"""The interval of an inequality, or the union of those joined by "or"; None for any other text.

    >>> as_interval(r"m \ge \sqrt{3}"), as_interval(r"2 \le x < 5"), as_interval("x^2 < 4")
    ('[\\sqrt{3},\\infty)', '[2,5)', None)
    >>> as_interval(r"x < -1 \text{ or } 1 < x"), as_interval(r"x \ne 2") == as_interval(r"\mathbb{R} \setminus \{2\}")
    ('(-\\infty,-1)\\cup(1,\\infty)', True)
    """
    if "\\ne" in text or "setminus" in text:
        excluded = _EXCEPT.fullmatch(tight(text))
        name, bound = (excluded[1], excluded[2] or excluded[3]) if excluded else ("", "")
        return rf"(-\infty,{bound})\cup({bound},\infty)" if bound and not (name and name in bound) else None
    if not _SIGN.search(text):
        return None
    pairs = [_interval(part) for part in _OR.split(text)]
    if None in pairs or len({pair[0] for pair in pairs if pair}) != 1:
        return None
    return r"\cup".join(pair[1] for pair in pairs if pair)


def _interval(text: str) -> tuple[str, str] | None:
    """The variable and its interval."""
    text = tight(text)
    signs, parts = _SIGN.findall(text), [part.strip() for part in _SIGN.split(text)]
    if not all(parts) or any("," in part or "=" in part for part in parts):
        return None
    is_less = ["<" in sign or sign.startswith(r"\l") for sign in signs]
    is_closed = [sign[-1] == "=" or "e" in sign for sign in signs]
    match parts:
        case [name, bound] if _NAME.fullmatch(name) and _is_free_of(bound, name):
            less, closed = is_less[0], is_closed[0]
        case [bound, name] if _NAME.fullmatch(name) and _is_free_of(bound, name):
            less, closed = not is_less[0], is_closed[0]
        case [low, name, high] if is_less[0] == is_less[1] and _NAME.fullmatch(name) and _is_free_of(low + high, name):
            left, right = "(["[is_closed[0]], ")]"[is_closed[1]]
            if not is_less[0]:
                low, high, left, right = high, low, "(["[is_closed[1]], ")]"[is_closed[0]]
            return name, f"{left}{low},{high}{right}"
        case _:
            return None
    return name, rf"(-\infty,{bound}{')]'[closed]}" if less else rf"{'(['[closed]}{bound},\infty)"


def _is_free_of(bound: str, name: str) -> bool:
    return name not in _LETTERS.findall(bound)
