"""Verdicts on answers in memory."""

from __future__ import annotations

from collections.abc import Sequence

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Verdict
from nft_megatron.config.sections import VerifyConfig
from nft_megatron.verify.modes import mode_of
from nft_megatron.verify.service import Verifier


def grade_answers(
    answers: Sequence[str],
    golds: Sequence[str],
    mode: str = "strict",
    workers: int = 2,
    questions: Sequence[str] | None = None,
) -> list[Verdict]:
    r"""The verdict on each of ``answers``, whole texts as a model wrote them, against the gold of the same position.

    ``mode`` is a verifier of docs/verification.md or one's own, ``module:function`` or a URL, which gets the ``questions`` too.
    Grader processes are started when the first answer needs one.

    Raises:
        UserError: no such mode, or not as many golds or questions as answers.

    >>> [verdict.label for verdict in grade_answers([r"2 + 2 = \boxed{4}", r"\boxed{5}", "four"], ["4", "4", "4"])]
    ['correct', 'wrong', 'wrong']
    """
    mode_of(mode, "mode")
    questions = [""] * len(answers) if questions is None else questions
    for name, texts in (("golds", golds), ("questions", questions)):
        if len(texts) != len(answers):
            raise UserError(name, f"{len(texts)} texts", f"there are {len(answers)} answers", "give one per answer")
    with Verifier(VerifyConfig.of_grader(mode, workers=workers)) as verifier:
        graded = zip(answers, golds, questions, strict=True)
        return list(verifier.verify_many((text, gold, "stop", question) for text, gold, question in graded))
