"""Verdicts on answers in memory."""

from __future__ import annotations

from collections.abc import Sequence

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Verdict
from nft_megatron.config.sections import VerifyConfig
from nft_megatron.verify.modes import MODES
from nft_megatron.verify.service import Verifier


def grade_answers(answers: Sequence[str], golds: Sequence[str], mode: str = "strict", workers: int = 2) -> list[Verdict]:
    r"""The verdict on each of ``answers``, whole texts as a model wrote them, against the gold of the same position.

    ``mode`` is a verifier of docs/verification.md. Grader processes are started when the first answer needs math-verify.

    Raises:
        UserError: no such mode, or not as many golds as answers.

    >>> [verdict.label for verdict in grade_answers([r"2 + 2 = \boxed{4}", r"\boxed{5}", "four"], ["4", "4", "4"])]
    ['correct', 'wrong', 'wrong']
    """
    if mode not in MODES:
        raise UserError("mode", mode, "no such mode", f"use one of {', '.join(MODES)}")
    if len(answers) != len(golds):
        raise UserError("golds", f"{len(golds)} texts", f"there are {len(answers)} answers", "give one gold per answer")
    with Verifier(VerifyConfig.model_validate({"mode": mode, "workers": workers})) as verifier:
        return list(verifier.verify_many((text, gold, "stop") for text, gold in zip(answers, golds, strict=True)))
