"""avg@k: k answers to each held-out question, the mean share of right ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nft_megatron.ask import Asker
from nft_megatron.config import EvaluateSection
from nft_megatron.observe.metrics import PhaseTimer
from nft_megatron.records import Answer, Prompt, Sampling


@dataclass(frozen=True)
class Evaluation:
    """Judged answers to held-out questions: ``answers[i]`` are those to ``prompts[i]``."""

    prompts: tuple[Prompt, ...]
    answers: tuple[tuple[Answer, ...], ...]

    @property
    def accuracy(self) -> float:
        """Share of right answers among the judged ones, averaged over questions; questions with none judged are left out."""
        rates = self._question_rates()
        return float(np.mean(rates)) if len(rates) else float("nan")

    @property
    def standard_error(self) -> float:
        """Of :attr:`accuracy`, from the spread between questions."""
        rates = self._question_rates()
        return float(np.std(rates, ddof=1) / np.sqrt(len(rates))) if len(rates) > 1 else float("nan")

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

    def _question_rates(self) -> np.ndarray:
        judged = [
            [answer.verdict.label == "correct" for answer in group if answer.verdict.label != "unknown"]
            for group in self.answers
        ]
        return np.array([np.mean(labels) for labels in judged if labels])


def evaluate(asker: Asker, prompts: Sequence[Prompt], settings: EvaluateSection, training: Sampling) -> Evaluation:
    """Answer and judge every prompt ``settings.samples`` times with the engine's current weights.

    Lengths and stops are those of training. The seeds don't depend on the step: the same weights give the same answers.
    """
    sampling = replace(training, temperature=settings.temperature, top_p=settings.top_p)
    # A clock of its own: to a training step all of this is "evaluate", not "generate" and "verify".
    answers = replace(asker, timer=PhaseTimer()).ask(prompts, settings.samples, sampling, purpose="evaluate")
    return Evaluation(tuple(prompts), tuple(answers))
