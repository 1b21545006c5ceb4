"""Lines 5-11 of Algorithm 1: ask, verify, keep the questions with 0 < r̂ < 1, write the step's ledger.

A step is collected in rounds. Each finished round is a file under RUN/ledger/rounds, so that a killed run asks nothing twice;
when the quota is met, all rounds become the one ledger file of the step. Everything that later steps and the metrics need
to know of the collecting stands in that file, so a step that is found on the disk counts as collected.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nft_megatron.ask import Asker
from nft_megatron.config import RolloutSection
from nft_megatron.data.ledger import Fate, read_groups, read_meta, write_ledger
from nft_megatron.data.prompts import PromptOrder
from nft_megatron.errors import UserError
from nft_megatron.observe.metrics import MetricsRow
from nft_megatron.records import Group, Sampling
from nft_megatron.run_folder import RunFolder
from nft_megatron.verify.reasons import reason_rates

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CollectorState:
    """What one step hands to the next.

    ``cursor``: questions asked so far, a position in the seeded order. ``mixed_rate``: share of the last step's questions that
    were mixed, None before the first. ``surplus``: mixed groups beyond the quota, empty unless they may be stale.
    ``questions``: a hash of all of them, without which the cursor means nothing; empty before the first step.
    """

    cursor: int = 0
    mixed_rate: float | None = None
    surplus: tuple[Group, ...] = ()
    questions: str = ""

    def save(self, path: Path) -> None:
        """Write it as a ledger file whose groups are the surplus."""
        meta = {"cursor": self.cursor, "mixed_rate": self.mixed_rate, "questions": self.questions}
        write_ledger(path, self.surplus, fates=["surplus"] * len(self.surplus), meta=meta)

    @classmethod
    def load(cls, path: Path) -> CollectorState:
        meta = read_meta(path)
        surplus = tuple(group for group, _ in read_groups(path))
        return cls(meta["cursor"], meta["mixed_rate"], surplus, meta["questions"])


@dataclass(frozen=True)
class Collected:
    """A collected step: its ledger file, the metrics of its answers, the state that the next step starts from.

    ``generated_tokens`` are those of this call, without what a killed one had left on the disk.
    """

    ledger: Path
    metrics: MetricsRow
    state: CollectorState
    generated_tokens: int


@dataclass(frozen=True)
class Collector:
    """Fills ledgers. Waits for engine and verifier, each within a deadline; lives on rank 0.

    ``left_out`` are metrics of the data set, how many of its questions are never asked; every ledger repeats them.
    """

    folder: RunFolder
    order: PromptOrder
    asker: Asker
    sampling: Sampling
    settings: RolloutSection
    left_out: Mapping[str, int] = field(default_factory=dict)

    @functools.cached_property
    def questions(self) -> str:
        """A hash of all prompts and golds in order."""
        digest = hashlib.sha256()
        for prompt in self.order.prompts:
            digest.update(f"{prompt.question_id}\0{prompt.gold}\0".encode() + prompt.tokens.tobytes())
        return digest.hexdigest()[:16]

    def collect(self, step: int, state: CollectorState) -> Collected:
        """The step's ledger, read back if it is on the disk already.

        Raises :class:`UserError` when not a single question had both right and wrong answers, and when the questions are not
        those that the run began with.
        """
        path = self.folder.ledger(step)
        self._check_questions(state.questions)
        generated_tokens = 0 if path.exists() else self._fill(path, step, state)
        for finished_round in self.folder.rounds(step):
            finished_round.unlink()
        with self.asker.timer.phase("ledger"):
            meta = read_meta(path)
            self._check_questions(meta["questions"])
            surplus = (
                tuple(group for group, fate in read_groups(path) if fate == "surplus") if self.settings.max_staleness else ()
            )
        return Collected(
            path, meta["metrics"], CollectorState(meta["cursor"], meta["mixed_rate"], surplus, self.questions), generated_tokens
        )

    def _check_questions(self, known: str) -> None:
        if known not in ("", self.questions):
            raise UserError(
                "data.train", f"{len(self.order.prompts)} questions", "are not those that this run began with",
                "restore the files, or start a new run in another run_dir",
            )  # fmt: skip

    def _fill(self, path: Path, step: int, state: CollectorState) -> int:
        quota = self.settings.questions_per_step
        mixed = [group for group in state.surplus if step - group.step <= self.settings.max_staleness]
        sampled: list[Group] = []
        cursor, mixed_rate, rounds, generated_tokens = state.cursor, state.mixed_rate, 0, 0
        while len(mixed) < quota and rounds < self.settings.max_rounds:
            round_file = self.folder.ledger_round(step, rounds)
            if round_file.exists():
                with self.asker.timer.phase("ledger"):
                    groups = [group for group, _ in read_groups(round_file)]
            else:
                label = f"round {rounds + 1}, {len(mixed)}/{quota} mixed"
                groups = self._ask(step, cursor, self._round_size(quota - len(mixed), mixed_rate), label)
                generated_tokens += sum(len(answer.completion.tokens) for group in groups for answer in group.answers)
                with self.asker.timer.phase("ledger"):
                    write_ledger(round_file, groups, fates=["sampled"] * len(groups), meta={})
            cursor += len(groups)
            rounds += 1
            sampled += groups
            mixed += [group for group in groups if group.is_mixed]
            mixed_rate = sum(group.is_mixed for group in sampled) / len(sampled)
        if not mixed:
            answers = [answer for group in sampled for answer in group.answers]
            count = Counter(answer.verdict.label for answer in answers)
            raise UserError(
                "rollout.max_rounds", self.settings.max_rounds,
                f"none of {len(sampled)} questions had both right and wrong answers "
                f"({count['correct']} right, {count['wrong']} wrong, {count['unknown']} unknown)",
                "raise it to ask more, or start a new run_dir with questions of another difficulty or longer answers",
            )  # fmt: skip
        if len(mixed) < quota:
            log.warning("step %d trains on %d of %d questions: %d rounds gave no more", step, len(mixed), quota, rounds)
        with self.asker.timer.phase("ledger"):
            surplus = mixed[quota:] if self.settings.max_staleness else []
            metrics = self._metrics(step, sampled, mixed[:quota], len(mixed) - quota, rounds)
            fates: list[Fate] = ["train" if index < quota else "surplus" for index in range(len(mixed[:quota] + surplus))]
            meta = {"cursor": cursor, "mixed_rate": mixed_rate, "questions": self.questions, "metrics": metrics}
            write_ledger(path, mixed[:quota] + surplus, fates=fates, meta=meta)
        return generated_tokens

    def _round_size(self, missing: int, mixed_rate: float | None) -> int:
        """Questions to ask for ``missing`` mixed ones: enough in five rounds of six, at most ``oversample`` times as many.

        n questions of which a share p is mixed give np ± sqrt(np(1−p)); n is chosen so that one standard deviation below the
        mean still suffices.
        """
        most = math.ceil(missing * self.settings.oversample)
        if mixed_rate is None:
            return most
        rate = max(mixed_rate, 1 / self.settings.oversample)
        return min(most, math.ceil((missing + math.sqrt(missing * (1 - rate))) / rate))

    def _ask(self, step: int, cursor: int, num_questions: int, label: str) -> list[Group]:
        prompts = self.order.take(cursor, num_questions)
        answers = self.asker.ask(
            prompts, self.settings.answers_per_question, self.sampling, purpose="train", first_id=cursor, label=label
        )
        return [Group(cursor + i, step, prompt, answers[i]) for i, prompt in enumerate(prompts)]

    def _metrics(self, step: int, sampled: Sequence[Group], trained: Sequence[Group], surplus: int, rounds: int) -> MetricsRow:
        """Of the questions asked in this step, before the prompt filter; ``groups_trained`` and ``staleness_max`` after it."""
        metrics: MetricsRow = {
            **self.left_out,
            "groups_sampled": len(sampled),
            "groups_mixed": sum(group.is_mixed for group in sampled),
            "groups_trained": len(trained),
            "groups_surplus": max(surplus, 0),
            "staleness_max": max(step - group.step for group in trained),
            "rounds": rounds,
        }
        if not sampled:
            return metrics
        answers = [answer for group in sampled for answer in group.answers]
        judged = sum(group.num_judged for group in sampled)
        lengths = np.array([len(answer.completion.tokens) for answer in answers])
        rates = [group.correct_rate for group in sampled if group.num_judged]
        bins = np.histogram(rates, bins=self.settings.answers_per_question + 1, range=(0, 1))[0]
        return metrics | {
            "accuracy": sum(group.num_correct for group in sampled) / judged if judged else math.nan,
            "correct_rate_histogram": bins.tolist(),
            "truncated_rate": float(np.mean([answer.completion.finish_reason == "length" for answer in answers])),
            "unknown_rate": 1 - judged / len(answers),
            **{f"verdict/{reason}": share for reason, share in reason_rates(answer.verdict for answer in answers).items()},
            "answer_length_mean": float(lengths.mean()),
            "answer_length_p90": float(np.percentile(lengths, 90)),
            "answer_length_max": int(lengths.max()),
            "response_tokens": int(lengths.sum()),
            "entropy_sampled": -float(
                np.concatenate([answer.completion.logprobs for answer in answers]).mean(dtype=np.float64)
            ),
        }
