"""The ways to judge an answer: what is decided at once, and which judge compares the rest.

A *grader* is the name of a mode, the import path of a user's function, or the URL of a user's service.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nft_megatron.base.errors import UserError
from nft_megatron.base.imported import is_import_path, source_hash
from nft_megatron.base.records import FinishReason, Verdict
from nft_megatron.verify.comparison import STRICT, Undecided
from nft_megatron.verify.grade import DAPO, cut_off, grade, grade_dapo
from nft_megatron.verify.program import PROGRAM
from nft_megatron.verify.published import ANSWER, BOXED, grade_answer, grade_boxed
from nft_megatron.verify.reasons import verdict
from nft_megatron.verify.simplerl import SIMPLERL

JudgeName = Literal["strict", "math-verify", "simplerl", "function", "service", "program"]


@dataclass(frozen=True)
class Mode:
    """``decide`` (text, gold, finish reason) is quick; what it leaves undecided goes to ``judge`` in a worker process.

    ``version`` names the rules in every verdict; the judge adds its own. ``forgives``: why it is too lenient to train on.
    """

    decide: Callable[[str, str, FinishReason], Verdict | Undecided]
    judge: JudgeName | None
    version: str
    forgives: str = ""

    @property
    def is_free(self) -> bool:
        """Whether answers and golds may have any form: no gold is a formula that a box could hold."""
        return self.judge in ("function", "service", "program")


def _whole_text(text: str, gold: str, finish_reason: FinishReason) -> Verdict | Undecided:
    return cut_off(finish_reason, "math-verify") or Undecided(text, gold)


def _whole_text_even_cut(text: str, gold: str, finish_reason: FinishReason) -> Verdict | Undecided:
    return verdict("engine fault", SIMPLERL) if finish_reason == "abort" else Undecided(text, gold)


def _program(text: str, gold: str, finish_reason: FinishReason) -> Verdict | Undecided:
    return cut_off(finish_reason, PROGRAM) or Undecided(text, gold)


MODES: dict[str, Mode] = {
    "strict": Mode(grade, judge="strict", version=STRICT),
    "math-verify": Mode(_whole_text, judge="math-verify", version=""),
    "dapo": Mode(grade_dapo, judge=None, version=DAPO),
    "published-boxed": Mode(grade_boxed, judge=None, version=BOXED),
    "published-answer": Mode(grade_answer, judge=None, version=ANSWER),
    "program": Mode(_program, judge="program", version=PROGRAM),
    "simplerl": Mode(
        _whole_text_even_cut,
        judge="simplerl",
        version=SIMPLERL,
        forgives="a factor of 100, a relative error of 1e-4, a missing box and truncation",
    ),
}
"""Modes by their name in ``verify.mode``."""


def mode_of(grader: str, field: str = "verify.mode") -> Mode:
    """The mode of that name, or that of a user's function or service.

    Raises:
        UserError: naming ``field``; ``grader`` is none of these, or the function's module is not there.

    >>> mode_of("textwrap:dedent").judge, mode_of("http://127.0.0.1:8000/grade").version
    ('function', 'service/http://127.0.0.1:8000/grade')
    """
    if grader in MODES:
        return MODES[grader]
    if grader.startswith(("http://", "https://")):
        return _users("service", f"service/{grader}")
    if is_import_path(grader):
        return _users("function", f"{grader}/{source_hash(grader, field)}")
    raise UserError(field, grader, "no such mode", f"use one of {', '.join(MODES)}, module:function or a URL")


def _users(judge: JudgeName, version: str) -> Mode:
    def decide(text: str, gold: str, finish_reason: FinishReason) -> Verdict | Undecided:
        return cut_off(finish_reason, version) or Undecided(text, gold)

    return Mode(decide, judge, version)


def is_users_rules(rules: str) -> bool:
    """Whether ``rules``, as verdicts name them, are those of a user's function or service.

    >>> is_users_rules("my_grader:grade/0f3c"), is_users_rules("strict/4 math-verify/0.9.0")
    (True, False)
    """
    return ":" in rules


def check_for_training(mode: str) -> None:
    """Raise :class:`UserError` for a mode that would reward wrong answers.

    Called where answers are collected to train on, not when a configuration loads: ``eval`` may measure a model in such a mode
    with the configuration of a run.

    >>> check_for_training("simplerl")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    nft_megatron.base.errors.UserError: verify.mode = simplerl: forgives a factor of 100, ...
    """
    if forgiven := mode_of(mode).forgives:
        others = [name for name in MODES if not MODES[name].forgives]
        raise UserError(
            "verify.mode",
            mode,
            f"forgives {forgiven}, which training would learn to exploit",
            f"set {', '.join(others[:-1])} or {others[-1]} (eval --grader takes any)",
        )
