r"""Whether a text already asks for the answer in a box, or on a line "Answer:".

A box is a request if it is empty or holds a placeholder (``\boxed{}``, ``\boxed{$Answer}``, ``\boxed{your answer}``), or if the
words before it say so ("give the answer as ``\boxed{x}``"). Others belong to the question: ``\boxed{N}`` may be a function, and
a box may hold red balls. In doubt a text asks for nothing, because to be asked twice does no harm.
"""

from __future__ import annotations

import re

# "\b" of JSON is a backspace
_MACRO = re.compile(r"(?:(?<!\\)\\++f?box(?:ed)?|\x08oxed|(?<![A-Za-z])boxed(?=\s?\{))(?![A-Za-z])")
_CONTENT = re.compile(r"\s?\{((?:[^{}]|\{[^{}]*\}){0,80})\}")
_DECORATION = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|mbox|l?dots)(?![A-Za-z])|[\s$<>\[\](){}\"'`*_.…-]")
_WORDS = re.compile(r"(?=.*[^\W\d_]{2})(?:[^\W\d_]|\s)+")
_OPERATOR = r"[=+*/<>×÷0-9-]"
_OPEN_FORMULA, _FORMULA_GOES_ON = re.compile(rf"{_OPERATOR} ?$"), re.compile(rf" ?{_OPERATOR}")
_LEADING = re.compile(
    r"\b(?:answers?\b(?!\s+(?:is|are|was)\b)|put|place|enclos\w+|wrap\w*|write|return|output|provide|respond|submit|format|within"
    r"|inside|for example|e\.g)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.?!][$)\"'*]*(?=\s)|[\n。？！]")
_LEADING_CHARS = 120

_HINTS = ("box", "\x08oxed", "framed", "框", "encadr", "kästchen", "kasten", "rahmen", "recuadro", "caja", "рамк")
_ANSWER = r"(?:answers?|results?|solutions?|responses?|conclusions?|final (?:value|number|expression)|choice)"
_SAME_SENTENCE = r"(?:(?!\bnumber of\b|\bhow many\b)[^.?!;\n]){0,60}?"
_IN_WORDS = re.compile(
    rf"\b{_ANSWER}\b{_SAME_SENTENCE}"
    r"(?:\b(?:in|inside|within|into)\s++(?:(?:an?|the|one|its own)\s*+)?(?:\w++\s++)?box\b|\bboxed\b|\bbox it\b)"
    rf"|\b(?:boxed|framed)\s+(?:final\s+)?(?:{_ANSWER}|form|format|notation|expression)\b"
    rf"|\bbox(?:ed)?\s+(?:in\s+)?(?:only\s+)?(?:your|the|each|every|all|both)\s+(?:\w+\s+)?{_ANSWER}\b"
    rf"|\bbox(?:es)?\s+around\s+(?:\w+\s+){{0,3}}{_ANSWER}\b"
    r"|答案[^。？！\n]{0,20}框|框[^。？！\n]{0,10}答案|encadr\w+[^.?!\n]{0,30}(?:réponse|résultat)|(?:réponse|résultat)[^.?!\n]{0,40}encadr"
    r"|(?:Antwort|Ergebnis|Lösung)[^.?!\n]{0,40}(?:Kästchen|Kasten|Box|Rahmen)|respuesta[^.?!\n]{0,40}(?:recuadro|caja)"
    r"|ответ[^.?!\n]{0,40}рамк",
    re.IGNORECASE,
)
_ANSWER_LINE = re.compile(r"\banswer\W{0,3}[:：]|答案\s*[:：]", re.IGNORECASE)


def asks_for_box(text: str) -> bool:
    r"""Whether ``text`` asks for the answer in a box.

    >>> asks_for_box(r"Put your final answer in \boxed{}."), asks_for_box("Box your answer."), asks_for_box("A box of 12 eggs")
    (True, True, False)
    >>> asks_for_box(r"Let $\boxed{N}$ be the number of divisors of $N$. Find $\boxed{12}$.")
    False
    """
    lowered = text.lower()
    if not any(hint in lowered for hint in _HINTS):
        return False
    return any(_is_request(text, macro) for macro in _MACRO.finditer(text)) or _IN_WORDS.search(text) is not None


def asks_for_answer_line(text: str) -> bool:
    """Whether ``text`` asks for a line that begins with "Answer:".

    >>> asks_for_answer_line("End with a line 'Answer: <number>'."), asks_for_answer_line("Answer in metres.")
    (True, False)
    """
    return _ANSWER_LINE.search(text) is not None


def has_box(text: str) -> bool:
    r"""Whether ``text`` has a box of any kind, as worked examples around a question do.

    >>> has_box(r"Q: 1+1? A: \boxed{2}")
    True
    """
    return _MACRO.search(text) is not None


def _is_request(text: str, macro: re.Match[str]) -> bool:
    content = _CONTENT.match(text, macro.end())
    inside = _DECORATION.sub(" ", content[1]) if content else ""
    before = text[max(macro.start() - _LEADING_CHARS, 0) : macro.start()]
    end = content.end() if content else macro.end()
    goes_on = _FORMULA_GOES_ON.match(text, end)  # as in 3 + \boxed{} = 5
    if _WORDS.fullmatch(inside) or (_LEADING.search(_SENTENCE_END.split(before)[-1]) and not goes_on):
        return True
    is_long = content is None and text[end : end + 2].lstrip().startswith("{")
    return not (inside.strip() or is_long or goes_on or _OPEN_FORMULA.search(before))
