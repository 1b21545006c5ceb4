r"""The instructions around a question of DAPO-Math-17k, and their variants.

| variant | the last line that it asks for | source |
|---|---|---|
| ``answer`` | ``Answer: $Answer (without quotes)`` | DAPO-Math-17k as published |
| ``boxed`` | ``Answer: \boxed{$Answer}`` | NFT's training data; what the ``strict`` verifier reads |

Everything here works on text alone, so that training, evaluation and comparing data sets mean the same by "the question".
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

from nft_megatron.base.records import Question

Wording = Literal["answer", "boxed"]

_OPENING = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: {form} "
    "is the answer to the problem."
)
_FORMS: dict[Wording, str] = {"answer": "$Answer (without quotes) where $Answer", "boxed": "\\boxed{$Answer} where $Answer"}
_CLOSING = 'Remember to put your answer on its own line after "Answer:".'

_OPENED = re.compile(rf"\s*+{re.escape(_OPENING)}\s++".replace(re.escape("{form}"), r"[^\n]*?"))


def _asked(text: str) -> str | None:
    """The question that a variant surrounds; None for any other text."""
    opened, end = _OPENED.match(text), text.rstrip()
    if opened is None or not end.endswith(_CLOSING):
        return None
    inside = end[opened.end() : len(end) - len(_CLOSING)]
    return inside.rstrip() if inside[-1:].isspace() else None


def bare(text: str) -> str:
    r"""The question alone, whichever variant surrounds it; any other text unchanged.

    >>> bare(worded("What is 2+2?", "answer")), bare("What is 2+2?")
    ('What is 2+2?', 'What is 2+2?')
    """
    asked = _asked(text)
    return text if asked is None else asked


def worded(text: str, wording: Wording) -> str:
    r"""The question in ``wording``, which replaces any variant around it.

    >>> print(worded("What is 2+2?", "boxed").split(". ")[1])
    The last line of your response should be of the form Answer: \boxed{$Answer} where $Answer is the answer to the problem.
    <BLANKLINE>
    What is 2+2?
    <BLANKLINE>
    Remember to put your answer on its own line after "Answer:".
    """
    return f"{_OPENING.replace('{form}', _FORMS[wording])}\n\n{bare(text)}\n\n{_CLOSING}"


def reword(question: Question, instruction: Literal["keep", "boxed", "answer", "none"]) -> Question:
    """A question in either variant, reworded or stripped (``none``). Any other question is returned unchanged; see
    :func:`instruct`.

    >>> asked = Question("q", ({"role": "user", "content": worded("What is 2+2?", "answer")},), gold="4")
    >>> reword(asked, "none").text, reword(asked, "boxed").text == worded("What is 2+2?", "boxed")
    ('What is 2+2?', True)
    """
    if instruction == "keep":
        return question

    def change(text: str) -> str:
        if _asked(text) is None:
            return text
        return bare(text) if instruction == "none" else worded(text, instruction)

    return replace(
        question, messages=tuple({**message, "content": change(message["content"])} for message in question.messages)
    )


def instruct(question: Question, wording: Wording) -> Question:
    """The question with its last message, which is the user's, in ``wording``, even if it was in no variant before.

    >>> instruct(Question("q", ({"role": "user", "content": "2+2?"},), gold="4"), "boxed").text == worded("2+2?", "boxed")
    True
    """
    *before, last = question.messages
    return replace(question, messages=(*before, {**last, "content": worded(last["content"], wording)}))
