r"""One plain LaTeX spelling for what models type: unicode, markdown, quotes, colours. Pure functions, linear in the text.

``**91**``, ``"12"``, ``２√３``, ``x²``, ``½``, ``\textcolor{blue}{12}`` become what LaTeX without decoration would say. Nothing
here changes a value; text that is plain already is returned as it is.
"""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎", "0123456789+-=()", strict=True))
_SYMBOLS = {
    "−": "-",
    "–": "-",
    "‐": "-",
    "‑": "-",
    "×": r"\times ",
    "✕": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "÷": r"\div ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "⩽": r"\le ",
    "≥": r"\ge ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "≡": r"\equiv ",
    "∈": r"\in ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∅": r"\emptyset ",
    "∠": r"\angle ",
    "°": r"^\circ ",
    "′": "'",
    "∶": ":",
    "⁄": "/",
    "∕": "/",
    "…": r"\ldots ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℚ": r"\mathbb{Q}",
    "ℕ": r"\mathbb{N}",
    "ℂ": r"\mathbb{C}",
}
_GREEK = dict(
    zip(
        "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ",
        [
            "alpha",
            "beta",
            "gamma",
            "delta",
            "epsilon",
            "zeta",
            "eta",
            "theta",
            "iota",
            "kappa",
            "lambda",
            "mu",
            "nu",
            "xi",
            "pi",
            "rho",
            "sigma",
            "tau",
            "upsilon",
            "phi",
            "chi",
            "psi",
            "omega",
            "Gamma",
            "Delta",
            "Theta",
            "Lambda",
            "Xi",
            "Pi",
            "Sigma",
            "Phi",
            "Psi",
            "Omega",
        ],
        strict=True,
    )
)
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}

_SUPERSCRIPT_RUN = re.compile(f"[{''.join(_SUPERSCRIPTS)}]++")
_SUBSCRIPT_RUN = re.compile(f"[{''.join(_SUBSCRIPTS)}]++")
# What a root sign covers: a number, a letter, a bracket without brackets inside, or a group that follows as it is.
_ROOT = re.compile(r"([√∛∜])\s*+(?:([0-9]++(?:\.[0-9]++)?+|[A-Za-z])|\(([^()]*+)\)|(?=[{\\]))")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
_NOT_PLAIN = re.compile(r"[^\x00-\x7f]|[*_`\"']|\\f?(?:text)?color|\\phantom|\{,\}")
_FORMULA = re.compile(r"\$\$([^$]++)\$\$|\$([^$]++)\$|\\\(((?:[^\\]|\\[^()])*+)\\\)|\\\[((?:[^\\]|\\[^\[\]])*+)\\\]")
_COLOUR = re.compile(
    r"\\(?:textcolor|colorbox|color|fcolorbox\s*+\{[^{}]*+\})(?![A-Za-z])\s*+(?:\[[^\[\]{}]*+\])?+\s*+\{[^{}]*+\}"
)
_CONSTANT = re.compile(r"\\mathrm\s*+\{\s*+([eid])\s*+\}")
_THOUSANDS = re.compile(r"(?<![0-9.,}])([1-9][0-9]{0,2}+)((?:\{,\}[0-9]{3})++)(?![0-9])")
_QUOTES = [
    ("**", "**"),
    ("__", "__"),
    ("*", "*"),
    ("``", "''"),
    ("`", "`"),
    ('"', '"'),
    ("'", "'"),
    ("“", "”"),
    ("‘", "’"),
    ("«", "»"),
]


def plain(text: str) -> str:
    r"""``text`` in plain LaTeX.

    >>> plain("**91**"), plain("２√３"), plain("x²+1"), plain(r"\textcolor{blue}{12}"), plain("3½"), plain(r"12{,}345")
    ('91', '2\\sqrt{3}', 'x^{2}+1', '{12}', '3\\frac{1}{2}', '12345')
    """
    text = text.strip().removeprefix("+")
    if text.startswith(("$", r"\(", r"\[")) and (formula := _FORMULA.fullmatch(text)):
        text = next(inside for inside in formula.groups() if inside is not None).strip()
    if text.count("$") == 1 and r"\$" not in text:
        text = text.replace("$", r"\$")
    if r"\mathrm" in text:
        text = _CONSTANT.sub(r"\1 ", text)
    if not _NOT_PLAIN.search(text):
        return text
    text = _unquoted(_COLOUR.sub("", text))
    if not text.isascii():
        text = _ascii(_INVISIBLE.sub("", text)).strip()
    return _THOUSANDS.sub(lambda found: found[1] + found[2].replace("{,}", ""), text)


def _unquoted(text: str) -> str:
    """Without the pairs of quotation marks and of markdown's asterisks that hold all of ``text``."""
    while True:
        for opening, closing in _QUOTES:
            inside = text[len(opening) : len(text) - len(closing)]
            if (
                inside
                and text.startswith(opening)
                and text.endswith(closing)
                and opening not in inside
                and closing not in inside
            ):
                text = inside.strip()
                break
        else:
            return text


def _ascii(text: str) -> str:
    text = "".join(map(_wide, text))
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^{" + "".join(map(_SUPERSCRIPTS.__getitem__, run.group())) + "}", text)
    text = _SUBSCRIPT_RUN.sub(lambda run: "_{" + "".join(map(_SUBSCRIPTS.__getitem__, run.group())) + "}", text)
    text = _ROOT.sub(lambda root: _ROOTS[root[1]] + (f"{{{root[2] or root[3]}}}" if root[2] or root[3] else ""), text)
    return "".join(map(_symbol, text))


def _wide(symbol: str) -> str:
    """Digits of any script, full-width characters and mathematical alphabets in ASCII; anything else unchanged."""
    if symbol.isascii():
        return symbol
    if symbol.isdecimal():
        return str(unicodedata.decimal(symbol))
    if "\uff01" <= symbol <= "\uff5e" or "\U0001d400" <= symbol <= "\U0001d7ff":
        return unicodedata.normalize("NFKC", symbol)
    return symbol


def _symbol(symbol: str) -> str:
    if symbol.isascii():
        return symbol
    if symbol in _GREEK:
        return f"\\{_GREEK[symbol]} "
    if (spelled := _SYMBOLS.get(symbol)) is not None:
        return spelled
    if unicodedata.decomposition(symbol).startswith("<fraction>"):
        above, _, below = unicodedata.normalize("NFKC", symbol).partition("\u2044")
        return rf"\frac{{{above}}}{{{below}}}" if below else symbol
    return symbol
