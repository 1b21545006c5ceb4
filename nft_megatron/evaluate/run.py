"""Answers to held-out questions, and the statistics of the model that gave them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from nft_megatron.base.records import Answer, Prompt, Sampling
from nft_megatron.collect.generate_and_grade import RolloutClient
from nft_megatron.config.sections import EvaluateConfig
from nft_megatron.evaluate.statistics import Judged, average, majority, pass_at, standard_error
from nft_megatron.observe.metrics import PhaseTimer
from nft_megatron.verify.boxes import MAX_BOX_CHARS
from nft_megatron.verify.reasons import REASONS, reason_of
from nft_megatron.verify.simplerl import extract, respell


@dataclass(frozen=True)
class Evaluation:
    """Judged answers to held-out questions: ``answers[i]`` are those to ``prompts[i]``.

    :mod:`nft_megatron.evaluate.statistics` defines the statistics.
    """

    prompts: tuple[Prompt, ...]
    answers: tuple[tuple[Answer, ...], ...]

    @property
    def accuracy(self) -> float:
        """avg@k: the share of correct answers among the judged ones, averaged over questions."""
        return average(self._judged)

    @property
    def standard_error(self) -> float:
        """The standard error of :attr:`accuracy`, from the spread between questions."""
        return standard_error(self._judged)

    def pass_at(self, k: int) -> float:
        return pass_at(self._judged, k)

    @property
    def majority(self) -> float:
        """maj@k."""
        return majority(self._judged)

    @property
    def truncated_rate(self) -> float:
        return float(np.mean([answer.completion.finish_reason == "length" for group in self.answers for answer in group]))

    @property
    def unknown_rate(self) -> float:
        return float(np.mean([answer.verdict.label == "unknown" for group in self.answers for answer in group]))

    @property
    def answer_length_mean(self) -> float:
        """Tokens."""
        return float(np.mean([len(answer.completion.tokens) for group in self.answers for answer in group]))

    @property
    def reasons(self) -> dict[str, int]:
        """How many answers have which reason for their verdict, in the order of ``REASONS``."""
        counts = Counter(reason_of(answer.verdict) for group in self.answers for answer in group)
        return {reason: counts[reason] for reason in REASONS if counts[reason]}

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """By question id, how many answers are right and how many were judged."""
        labels = [[answer.verdict.label for answer in group] for group in self.answers]
        return {
            prompt.question_id: (own.count("correct"), len(own) - own.count("unknown"))
            for prompt, own in zip(self.prompts, labels, strict=True)
        }

    def without(self, question_ids: frozenset[str]) -> Evaluation:
        """The same answers without those to ``question_ids``."""
        kept = [i for i, prompt in enumerate(self.prompts) if prompt.question_id not in question_ids]
        return Evaluation(tuple(self.prompts[i] for i in kept), tuple(self.answers[i] for i in kept))

    @cached_property
    def _judged(self) -> list[Judged]:
        known = [[answer for answer in group if answer.verdict.label != "unknown"] for group in self.answers]
        return [
            Judged(tuple(answer.verdict.label == "correct" for answer in group), tuple(vote_of(answer) for answer in group))
            for group in known
            if group
        ]


def vote_of(answer: Answer) -> str | None:
    r"""What an answer votes for: its final answer as the final evaluation's grader reads and normalises it; None if it has
    none or was cut off. One of more than ``MAX_BOX_CHARS`` characters is not normalised.

    >>> from nft_megatron.base.records import Completion, Verdict
    >>> completion = Completion(0, 0, np.ones(1, np.int32), -np.ones(1, np.float32), "stop", 0, 0.0)
    >>> texts = r"\boxed{\dfrac12}", r"so $\boxed{x = \frac{1}{2}}$", "The answer is 5.0.", "I give up"
    >>> [vote_of(Answer(completion, text, Verdict("wrong", "", ""))) for text in texts]
    ['\\frac{1}{2}', '\\frac{1}{2}', '5', None]
    """
    if answer.completion.finish_reason != "stop":
        return None
    stated = extract(answer.text)
    return (respell(stated) if len(stated) <= MAX_BOX_CHARS else stated) or None


def evaluate(client: RolloutClient, prompts: Sequence[Prompt], settings: EvaluateConfig, training: Sampling) -> Evaluation:
    """Answer and judge every prompt ``settings.samples`` times with the engine's current weights.

    Lengths and stop tokens are those of training. Seeds do not depend on the step: the same weights give the same answers.
    """
    sampling = replace(training, temperature=settings.temperature, top_p=settings.top_p)
    # Its own clock: to a training step all of this is "evaluate", not "generate" and "verify".
    answers = replace(client, timer=PhaseTimer()).ask(prompts, settings.samples, sampling, purpose="evaluate")
    return Evaluation(tuple(prompts), tuple(answers))
