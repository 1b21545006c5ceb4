r"""The graders that the authors' code trains with: texts are compared, numbers are not. Pure functions.

``published-boxed``, for questions that ask for a box, as the authors' training data do: the text between the braces of the last
``\boxed{`` in the last 100 characters must be the gold, character by character. `\boxed{34.0}`, `\boxed{ 34}`, `\fbox{34}` and
a box that opens before the last 100 characters are wrong for the gold 34.

``published-answer``, for the wording of DAPO-Math-17k: the rest of the last line with "Answer:" in the last 300 characters
must be the gold, after both are normalised by the rules of Minerva's evaluation (arXiv 2206.14858).

Both judge the text alone: an answer that was truncated after its box or its line is correct. Two departures: an answer that the
engine aborted is unknown, and an answer without a box is wrong even if the gold is the text by which their code marks it.
"""

from __future__ import annotations

import re

from nft_megatron.base.records import FinishReason, Verdict
from nft_megatron.verify.reasons import verdict

BOXED = "published-boxed/1"
ANSWER = "published-answer/1"
_BOXED_WINDOW = 100
_ANSWER_WINDOW = 300

_OPENING = r"\boxed{"
_ANSWER_LINE = re.compile(r"answer\s*+:(\s*+[^\n]++|[^\n]++)", re.IGNORECASE)  # on a line below, if the rest is empty
# Minerva's normalisation, in its order: texts replaced by others, then texts removed.
_REPLACED = (
    *(("an ", ""), ("a ", ""), (".$", "$"), (r"\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text")),
    *((r",\text{and}", ","), (r"\text{and}", ","), (r"\text{m}", r"\text{}")),
)
_REMOVED = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", r"\ldots", "sue", "points", "feet"),
    *("minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples", r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", "\\text{\n}"),
    *(r"\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots"),
)
_STYLES = tuple(re.compile(rf"\\{name}\{{([^}}\n]*+)\}}") for name in ("text", "textbf", "overline"))
_FRACTION = re.compile(r"frac([^{])(.)")
_ROOT = re.compile(r"sqrt([^{])")


def grade_boxed(text: str, gold: str, finish_reason: FinishReason) -> Verdict:
    r"""The verdict of ``published-boxed``.

    >>> [grade_boxed(text, "34", "length").label for text in (r"so \boxed{34}", r"\boxed{34.0}", r"\boxed{34}" + "." * 99)]
    ['correct', 'wrong', 'wrong']
    """
    if finish_reason == "abort":
        return verdict("engine fault", BOXED)
    content = _last_box(text[-_BOXED_WINDOW:])
    if content is None:
        return verdict("no closed box", BOXED)
    return verdict("exact" if content == gold else "not equal", BOXED)


def grade_answer(text: str, gold: str, finish_reason: FinishReason) -> Verdict:
    """The verdict of ``published-answer``.

    >>> [grade_answer(text, "1234", "stop").label for text in ("Answer: $x = 1,234$", "Answer: 1234.0", "It is 1234.")]
    ['correct', 'wrong', 'wrong']
    """
    if finish_reason == "abort":
        return verdict("engine fault", ANSWER)
    lines = _ANSWER_LINE.findall(text[-_ANSWER_WINDOW:])
    if not lines:
        return verdict("no answer found", ANSWER)
    return verdict("exact" if normalise(lines[-1].lstrip()) == normalise(gold) else "not equal", ANSWER)


def _last_box(text: str) -> str | None:
    r"""The content of the last ``\boxed{``; None without one, or if it never closes. Escaped braces count too."""
    start = text.rfind(_OPENING)
    if start < 0:
        return None
    depth = 0
    for position in range(start + len(_OPENING), len(text)):
        if text[position] == "}":
            if depth == 0:
                return text[start + len(_OPENING) : position]
            depth -= 1
        elif text[position] == "{":
            depth += 1
    return None


def normalise(answer: str) -> str:
    r"""An answer in the spelling in which Minerva's evaluation compares it.

    >>> [normalise(answer) for answer in ("x = 12 cm^2", r"the value is $\frac12$.", "a 1,000 dollars", r"\text{34}^\circ")]
    ['12^2', '\\frac{1}{2}', '1000', '34']
    """
    answer = answer.rpartition("=")[2]
    for before, after in _REPLACED:
        answer = answer.replace(before, after)
    for each in _REMOVED:
        answer = answer.replace(each, "")
    formula = answer.split("$", 2)
    answer = formula[1] if len(formula) == 3 else answer
    for style in _STYLES:
        answer = style.sub(r"\1", answer)
    start, end = answer.find(_OPENING), answer.rfind("}")
    if 0 <= start < end:
        answer = answer[:start] + answer[start + len(_OPENING) : end] + answer[end + 1 :]
    answer = _ROOT.sub(r"sqrt{\1}", _FRACTION.sub(r"frac{\1}{\2}", answer)).replace("$", "")
    digits = answer.replace(",", "")
    return (digits if digits.isdigit() else answer).strip()
