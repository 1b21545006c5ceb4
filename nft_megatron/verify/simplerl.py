r"""The verifier of the final evaluation, which produced the paper's tables: "simpleRL", the grader of Qwen2.5-Math.

An answer is read from the text: after "final answer is", from the last box, or else the last number (:func:`extract`). Answer
and gold are normalised to one spelling (:func:`respell`) and compared (:func:`equal`): as texts; as numbers, tolerating a
relative error of 1e-4 and a factor of 100 either way (percent); as lists, matrices and equations, part by part; last by
computer algebra. A truncated answer is judged by its text. Pure functions, but algebra may take forever: callers with a
deadline use ``Verifier(VerifyConfig(mode="simplerl"))``.

Departures from the public code, all in places where its spelling rules turn one answer into another:

1. Units are removed only after a number or in ``\text{}`` at the end. The public code removes single letters anywhere, so that
   ``(a+5)(b+2)`` becomes ``(+5)(b+2)``; evaluations of Minerva Math therefore switch units off there, which is not needed here.
2. A space after a command stays (``\cot x``, not ``\cotx``); "and" becomes a comma, and commas are removed only between
   thousands ("6 and 8" and "6,8" are not 68); ``\pm`` stays; ``j`` does not become ``i``; numbers in words are not read.
3. Only latex2sympy2_extended, which shares its antlr4 with math-verify, reads LaTeX; nothing is evaluated as Python.
4. Numbers with a power of ten, with or without a unit, fractions and mixed numbers are compared as numbers; lists of tuples
   part by part; ``a/b`` is ``\frac{a}{b}`` wherever that is beyond doubt.
5. Anything longer than ``MAX_ALGEBRA_CHARS`` is compared only as text and number.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

from nft_megatron.base.records import Verdict
from nft_megatron.verify.numbers import same_value_spelling
from nft_megatron.verify.reasons import verdict

SIMPLERL = "simplerl/3"
MAX_ALGEBRA_CHARS = 1000

_RELATIVE_ERROR = 1e-4
_LAST_WORDS = ("he answer is", "final answer is")
_NUMBER = re.compile(r"-?(?:\d++(?:\.\d++)?+|\.\d++)")
_UNIT = (
    r"(?:degrees?|deg|percent|units?|ways?|dollars?|cents?|(?:kilo|centi|milli)?met(?:er|re)s?|inch(?:es)?|feet|foot|ft|miles?|yards?|"
    r"[kcm]m|km/h|kmh|mph|kg|grams?|lit(?:er|re)s?|gallons?|hours?|hrs?|minutes?|min|seconds?|sec|days?|weeks?|months?|years?|"
    r"pounds?|lbs?|square|cubic|sq|per|times|points?|people|men|women|students?|numbers?)"
)
_THOUSANDS = re.compile(r"(?<=\d),(?=(?:\d{3},)*\d{3}(?!\d))")
_FRACTION = re.compile(r"(-?)([0-9]*+)\\frac\{([0-9]++(?:\.[0-9]++)?+)\}\{([0-9]++(?:\.[0-9]++)?+)\}")
_MATRIX = re.compile(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", re.DOTALL)

# A number and a power of ten, or the power alone, and nothing but a unit behind it; 1.5e3 may have a unit too.
_PLAIN_NUMBER = r"([+-]?(?:[0-9]++(?:\.[0-9]*+)?+|\.[0-9]++))"
_SCIENTIFIC = re.compile(
    rf"(?:{_PLAIN_NUMBER}\s*+(?:\\times|\\cdot|\*|×|·)\s*+)?+10\s*+\^\s*+(?:\{{\s*+([+-]?[0-9]{{1,4}}+)\s*+\}}|(-?[0-9]++))"
    rf"|{_PLAIN_NUMBER}[eE]([+-]?[0-9]{{1,4}}+)(?![0-9])"
)
_UNIT_BEHIND = re.compile(
    r"(?:[\s~/{}.]|\\[,;: !]|\\cdot(?![A-Za-z])|\^\s*+\{?-?[0-9]\}?|\^\{?\\circ\}?"
    r"|\\(?:text|mathrm|mbox|textrm|rm|operatorname)(?![A-Za-z])|\\(?:mu|Omega|AA|degree|odot)(?![A-Za-z])|_\{?\\odot\}?|(?<![0-9])[A-Za-z]++)*+"
)

_SPELLINGS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(pattern), spelling)
    for pattern, spelling in (
        (r"\\[!,;:]|(?<!\\)\\ |~|\\quad|\\displaystyle|\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])", " "),
        (r"\\\(|\\\)|\\\[|\\\]|\\?\$", " "),
        (r"\\[dt]frac", r"\\frac"),
        (r"\\begin\{array\}(?:\{[^{}]*\})?|\\begin\{bmatrix\}", r"\\begin{pmatrix}"),
        (r"\\end\{(?:array|bmatrix)\}", r"\\end{pmatrix}"),
        (r"\\([{}])", r"\1"),
        (r"\\leq(?:slant)?(?![A-Za-z])", r"\\le"),
        (r"\\geq(?:slant)?(?![A-Za-z])", r"\\ge"),
        (r"\^\s*+\{?\s*+\\circ\s*+\}?|°|\\degree", ""),
        (r"\\text\s*\{\s*(?:and|or)\s*\}|(?<![A-Za-z\\])and(?![A-Za-z])", ","),
        (r"(?<=\S)\s*\\(?:text|mbox|textrm|mathrm)\s*\{[^{}]*\}(?:\^\{?[23]\}?)?\s*\.?$", ""),
        (r"(?<=\d)\s*(?:" + _UNIT + r"(?:\s*\^\s*\{?[23]\}?)?(?:\s+|$))+$", ""),
        (r"\\(?:text|textbf|mbox|mathbf|mathrm|boldsymbol|mathit)\s*\{([^{}]*)\}", r"\1"),
        (r"\\?%", ""),
        (r"(?<![A-Za-z\\])inf(?:inity)?(?![A-Za-z])", r"\\infty "),
        (r"(?<![\d.])\.(?=\d)", "0."),
        (r"(?<![\d.])(\d+)\.0*(?!\d)", r"\1"),
        (r"^(-?[0-9]+)\s+([0-9]+)/([0-9]+)$", r"\1\\frac{\2}{\3}"),
        (r"(\\[A-Za-z]+)\s+(?=[A-Za-z])|\s+", lambda found: f"{found[1]} " if found[1] else ""),
        (r"\\sqrt(\w)", r"\\sqrt{\1}"),
        (r"\\frac(\w)(\w)", r"\\frac{\1}{\2}"),
        (r"\\frac(\w)\{", r"\\frac{\1}{"),
        (r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}"),
    )
]


def grade(answer_text: str, gold: str) -> Verdict:
    r"""The verdict on a whole answer; ``gold`` is spelled as in its data set.

    >>> grade(r"... so the answer is $\boxed{\frac12}$.", "0.5")
    Verdict(label='correct', reason='equal', verifier='simplerl/3', seconds=0.0)
    >>> grade("First 17, then 34", "34").label, grade(r"\boxed{50\%}", "0.5").label, grade(r"\boxed{(1, 3)}", "(1,2)").label
    ('correct', 'correct', 'wrong')
    """
    answer, gold = respell(extract(answer_text)), respell(gold)
    if not gold:
        return verdict("unreadable gold", SIMPLERL)
    if not answer:
        return verdict("no answer found", SIMPLERL)
    if answer.lower() == gold.lower():
        return verdict("exact", SIMPLERL)
    return verdict("equal" if equal(answer, gold) else "not equal", SIMPLERL)


def extract(text: str) -> str:
    r"""The part of ``text`` that is its answer; "" if there is none.

    >>> extract(r"\boxed{1}, no: \boxed{\frac{1}{2}}."), extract("The answer is 3."), extract("1,234 or so"), extract("none")
    ('\\frac{1}{2}', '3', '1234', '')
    """
    _, introduced, quoted = text.partition("final answer is $")
    if introduced and "$. I hope" in text:
        answer = quoted.partition("$. I hope")[0]
    elif "boxed" in text:
        answer = _last_box(text)
    elif words := next((words for words in _LAST_WORDS if words in text), None):
        answer = text.rpartition(words)[2]
    else:
        answer = (_NUMBER.findall(text.replace(",", "")) or [""])[-1]
    return answer.strip().removeprefix(":").removesuffix(".").removesuffix("/").strip()


def respell(answer: str) -> str:
    r"""``answer`` in the one spelling that all texts of the same meaning share.

    >>> respell(r" \left( 3, \dfrac12 \right) "), respell(r"x = 5.00\text{ cm}"), respell(r"3 \pm 2\sqrt3"), respell("12/7")
    ('(3,\\frac{1}{2})', '5', '3\\pm2\\sqrt{3}', '\\frac{12}{7}')
    """
    answer = _decimal_power(answer.strip().rstrip("."))
    for pattern, spelling in _SPELLINGS:
        answer = pattern.sub(spelling, answer).strip()
    name, equals, value = answer.partition("=")
    return value if equals and len(name) <= 2 and "=" not in value and value else answer


def _decimal_power(answer: str) -> str:
    r"""``4.5 \times 10^{33}\text{ erg/s}`` as ``4.5e33``; anything but a number with a power of ten and a unit unchanged.

    >>> [_decimal_power(text) for text in (r"4.5\cdot 10^{33} \mathrm{~erg}", "10^{-8}", "10^{11}x+1", "L = 3e8 m")]
    ['4.5e33', '1e-8', '10^{11}x+1', 'L=3e8']
    """
    text = re.sub(r"\\[,;:! ]|\$|\\left|\\right|~", " ", answer).replace("{,}", "").replace("−", "-").strip()
    name, equals, value = text.rpartition("=")
    if equals and not re.fullmatch(r"\s*+(?:[A-Za-z]|\\[A-Za-z]++)(?:_(?:[0-9A-Za-z]|\{[^{}=]*+\}))?+\s*+", name):
        return answer
    value = value.strip()
    while value[:1] + value[-1:] in ("()", "{}"):
        value = value[1:-1].strip()
    found = _SCIENTIFIC.match(value)
    if found is None or not _UNIT_BEHIND.fullmatch(value, found.end()):
        return answer
    number = f"{found[1] or found[4] or 1}e{found[2] or found[3] or found[5]}"
    return f"{name.strip()}={number}" if equals else number


def equal(answer: str, gold: str) -> bool:
    r"""Whether two texts in the spelling of :func:`respell` mean the same.

    >>> equal("0.3333", r"\frac{1}{3}"), equal("(0,0.5)", r"(0,\frac{1}{2})"), equal("y=2x", "2x-y=0"), equal("x+1", "x+2")
    (True, True, True, False)
    """
    if answer.lower() == gold.lower() or (gold in tuple("ABCDE") and _last_letter(answer) == gold):
        return True
    answer_number, gold_number = _number(answer), _number(gold)
    if answer_number is not None and gold_number is not None:
        return any(_close(answer_number, gold_number * factor) for factor in (1.0, 0.01, 100.0))
    answer_value, gold_value = _value(answer), _value(gold)
    if answer_value is not None and gold_value is not None and _close(answer_value, gold_value):
        return True
    if _without_brackets(answer) == _without_brackets(gold) or same_value_spelling(answer, gold):
        return True
    answer_parts, gold_parts = _parts(answer), _parts(gold)
    if answer_parts and gold_parts:
        return len(answer_parts) == len(gold_parts) and all(map(equal, answer_parts, gold_parts))
    if answer.count("=") == gold.count("=") == 1:
        answer, gold = (f"{left}-({right})" for left, _, right in (answer.partition("="), gold.partition("=")))
        return _same_expression(answer, gold) or _same_expression(f"-({answer})", gold)
    for one, other in ((answer, gold), (gold, answer)):
        name, equals, value = one.partition("=")
        if equals and "=" not in value + other and len(name) <= 2:
            return equal(value, other)
    return _same_expression(answer, gold)


def _last_box(text: str) -> str:
    """The content of the last box: up to the end of the text if it is not closed, of the formula if it has no braces."""
    content = text.rpartition("boxed")[2].lstrip()
    if not content.startswith("{"):
        return content.partition("$")[0]
    depth = 0
    for brace in re.finditer("[{}]", content):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return content[1 : brace.start()]
    return content[1:]


def _last_letter(answer: str) -> str:
    return (re.findall(r"\b[A-E]\b", answer.upper()) or [""])[-1]


def _number(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        return float(_THOUSANDS.sub("", text))
    return None


def _value(text: str) -> float | None:
    r"""Of a number, ``\frac{1}{2}`` or ``1\frac{1}{2}``, since algebra does not read ``5e-1``."""
    if (found := _FRACTION.fullmatch(text)) is None:
        return _number(text)
    below = float(found[4])
    value = float(found[2] or 0) + float(found[3]) / below if below else None
    return -value if value and found[1] else value


def _close(answer: float, gold: float) -> bool:
    return math.isclose(answer, gold, rel_tol=_RELATIVE_ERROR)


def _without_brackets(text: str) -> str:
    return re.sub(r"[{}()]", "", text).lower()


def _parts(text: str) -> list[str]:
    r"""The elements of ``(a,b]``, or of a matrix row by row, each row after its length; nothing for any other text."""
    if matrix := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in matrix[1].split(r"\\") if row]
        return list(itertools.chain.from_iterable([str(len(row)), *row] for row in rows))
    if len(text) < 3 or text[0] not in "([" or text[-1] not in ")]":
        return []
    parts, depth = [""], 0
    for symbol in text[1:-1]:
        depth += (symbol in "([{") - (symbol in ")]}")
        if depth < 0:  # "(a,b),(c,d)": the first bracket is not closed by the last
            return _parts(f"({text})") if "),(" in text else []
        if symbol == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += symbol
    return parts if len(parts) > 1 else []


def _same_expression(answer: str, gold: str) -> bool:
    """Whether computer algebra finds the two equal, exactly or within the relative error."""
    if max(len(answer), len(gold)) > MAX_ALGEBRA_CHARS:
        return False
    first, second = _expression(answer), _expression(gold)
    if first is None or second is None:
        return False
    return any(_holds(test, first, second) for test in (_equal_exactly, _equal_relations, _equal_numerically))


def _expression(latex: str) -> Any:
    """``latex`` as a SymPy expression; None if it cannot be read."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy

    with contextlib.suppress(Exception):  # whatever the parser raises, it could not read the text
        return latex2sympy(latex, normalization_config=NormalizationConfig(basic_latex=True, boxed="none"))
    return None


def _holds(test: Callable[[Any, Any], bool], first: Any, second: Any) -> bool:
    """SymPy raises where a test does not apply: sets, booleans, matrices of different shapes."""
    with contextlib.suppress(Exception):
        return bool(test(first, second))
    return False


def _equal_exactly(first: Any, second: Any) -> bool:
    from sympy import simplify

    return first == second or first.equals(second) or simplify(first - second) == 0


def _equal_relations(first: Any, second: Any) -> bool:
    return abs(first.lhs - first.rhs).equals(abs(second.lhs - second.rhs))


def _equal_numerically(first: Any, second: Any) -> bool:
    return _close(float(first.evalf()), float(second.evalf()))
