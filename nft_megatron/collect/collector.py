"""Lines 5-11 of Algorithm 1: generate, grade, keep the questions with 0 < r̂ < 1, write the step's ledger.

A step is collected in rounds; once the quota is met, all rounds become the step's one ledger file. That file holds everything
about the collection that later steps and the metrics need, so a step whose file exists counts as collected. Answers from
weights older than ``rollout.max_staleness`` allows are dropped when the ledger is written. ``stream.py`` knows no rounds.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Group, Sampling
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.collect.generate_and_grade import RolloutClient
from nft_megatron.collect.rounds import Rounds
from nft_megatron.collect.verdict_counts import describe_verdicts
from nft_megatron.config.sections import RolloutConfig
from nft_megatron.data.ledger import Fate, check_step, read_groups, read_meta, write_ledger
from nft_megatron.data.prompts import PromptOrder
from nft_megatron.observe.collected import sampled_metrics, trained_metrics
from nft_megatron.observe.metrics import MetricsRow

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CollectorState:
    """What one step hands to the next.

    ``cursor``: number of questions asked so far, a position in the seeded order. ``mixed_rate``: share of the last step's
    questions that were mixed, None before the first step. ``surplus``: mixed groups beyond the quota, empty unless staleness is
    allowed. ``questions``: a hash of all questions, to which the cursor refers; empty before the first step. ``in_flight``:
    positions before the cursor whose questions a stream had not closed.

    >>> CollectorState(cursor=1024, mixed_rate=0.6, questions="6b86b273ff34fce1").surplus
    ()
    """

    cursor: int = 0
    mixed_rate: float | None = None
    surplus: tuple[Group, ...] = ()
    questions: str = ""
    in_flight: tuple[int, ...] = ()

    def save(self, path: Path) -> None:
        """Write the state as a ledger file whose groups are the surplus."""
        meta = {"cursor": self.cursor, "mixed_rate": self.mixed_rate, "questions": self.questions} | _in_flight(self.in_flight)
        write_ledger(path, self.surplus, fates=["surplus"] * len(self.surplus), meta=meta)

    @classmethod
    def load(cls, path: Path) -> CollectorState:
        meta = read_meta(path)
        surplus = tuple(group for group, _ in read_groups(path))
        try:
            return cls(meta["cursor"], meta["mixed_rate"], surplus, meta["questions"], tuple(meta.get(_IN_FLIGHT, ())))
        except (LookupError, TypeError, AttributeError) as error:
            remedy = "resume from another checkpoint: name it in RUN/checkpoints/latest"
            raise UserError("checkpoint", path, f"does not say where collecting stood: {error}", remedy) from error


_IN_FLIGHT = "in_flight"
"""Only in ledgers of a stream."""


def _in_flight(positions: Sequence[int]) -> dict[str, list[int]]:
    return {_IN_FLIGHT: list(positions)} if positions else {}


@dataclass(frozen=True)
class Dataset:
    """A collected step: its ledger file and the metrics of its answers.

    ``generated_tokens`` counts only tokens generated during this step, not those that a killed process left on disk or
    that were collected while an earlier step trained.

    >>> dataset = Dataset(Path("runs/a/ledger/step_000012.parquet"), {"accuracy": 0.44, "groups_trained": 512}, 6_291_456)
    >>> dataset.metrics["groups_trained"]
    512
    """

    ledger: Path
    metrics: MetricsRow
    generated_tokens: int


@dataclass(frozen=True)
class Gathered:
    """What a step's ledger is made of.

    ``sampled``: the groups closed since the last ledger. ``trainable``: those that may be trained on, from then or earlier, and
    first the ``num_trained`` that this step trains. ``num_too_old``: answers left out of them. ``metrics``: how they were
    gathered. ``num_tokens``: generated in this process.
    """

    sampled: Sequence[Group]
    trainable: Sequence[Group]
    num_trained: int
    num_too_old: int
    cursor: int
    num_tokens: int
    metrics: MetricsRow
    in_flight: Sequence[int] = ()


@dataclass(frozen=True)
class Collector:
    """Collects steps into ledgers, on rank 0. Waits for engine and verifier, each with a deadline.

    ``left_out``: metrics of the dataset, how many of its questions are never asked; every ledger repeats them.
    ``filters_prompts``: train only on mixed groups; False: on all groups with a judged answer.
    ``interrupted`` gives a reason to stop in the middle of a step, or None. ``rules``: by which answers are judged now, and
    ``earlier_rules``: those of the run's earlier steps if they are others, both as in a verdict; they are part of each ledger.
    """

    folder: RunFolder
    order: PromptOrder
    client: RolloutClient
    sampling: Sampling
    settings: RolloutConfig
    filters_prompts: bool = True
    left_out: Mapping[str, int] = field(default_factory=dict)
    interrupted: Callable[[], str | None] = lambda: None
    rules: str = ""
    earlier_rules: str | None = None

    @functools.cached_property
    def rounds(self) -> Rounds:
        return Rounds(self.folder, self.order, self.client, self.sampling, self.settings, self.interrupted)

    @functools.cached_property
    def questions(self) -> str:
        """A hash of all prompts and gold answers, in order."""
        digest = hashlib.sha256()
        for prompt in self.order.prompts:
            digest.update(f"{prompt.question_id}\0{prompt.gold}\0".encode() + prompt.tokens.tobytes())
        return digest.hexdigest()[:16]

    def collect(self, step: int, state: CollectorState) -> tuple[Dataset, CollectorState]:
        """The step's ledger, read back if it exists already, and the state that the next step starts from.

        Raises :class:`UserError` if no question got both right and wrong answers, if the questions differ from those that the
        run started with, or if the ledger is another step's; :class:`~nft_megatron.base.errors.StoppedEarly` if interrupted,
        with finished groups saved.
        """
        path = self.folder.ledger(step)
        self._check_questions(state.questions)
        generated_tokens = 0 if path.exists() else self._fill(path, step, state)
        check_step(path, step, oldest=step - self.settings.max_staleness)
        for part in self.folder.rounds(step):
            part.unlink()
        with self.client.timer.phase("ledger"):
            meta = read_meta(path)
            self._check_questions(meta["questions"])
            surplus = (
                tuple(group for group, fate in read_groups(path) if fate == "surplus") if self.settings.max_staleness else ()
            )
        after = CollectorState(meta["cursor"], meta["mixed_rate"], surplus, self.questions, tuple(meta.get(_IN_FLIGHT, ())))
        return Dataset(path, meta["metrics"], generated_tokens), after

    def finish(self) -> None:
        """Nothing more will be collected."""

    def _check_questions(self, known: str) -> None:
        if known not in ("", self.questions):
            raise UserError(
                "data.train",
                f"{len(self.order.prompts)} questions",
                "are not the questions that this run started with",
                "restore the files, the tokenizer and its template, or start a new run in another run_dir",
            )

    def _nothing_to_train_on(self, sampled: Sequence[Group]) -> UserError:
        """Every question has answers of one kind only: how they were judged, and one of them."""
        problem = f"none of {len(sampled)} questions had both right and wrong answers ({describe_verdicts(sampled)})"
        remedy = "raise it to ask more, or start a new run_dir with questions of another difficulty or longer answers"
        return UserError("rollout.max_rounds", self.settings.max_rounds, problem, remedy)

    def _fill(self, path: Path, step: int, state: CollectorState) -> int:
        """Write the step's ledger; return the number of tokens generated for it."""
        gathered = self._gather(step, state)
        sampled, trainable, num_trained = gathered.sampled, gathered.trainable, gathered.num_trained
        if not trainable:
            raise self._nothing_to_train_on(sampled)
        with self.client.timer.phase("ledger"):
            kept = trainable if self.settings.max_staleness else trainable[:num_trained]
            metrics: MetricsRow = {
                **self.left_out,
                **gathered.metrics,
                "groups_surplus": len(trainable) - num_trained,
                "answers_too_old": gathered.num_too_old,
                **sampled_metrics(sampled, self.settings.group_size),
                **trained_metrics(step, trainable[:num_trained]),
            }
            fates: list[Fate] = ["train" if index < num_trained else "surplus" for index in range(len(kept))]
            meta = {
                "step": step,
                "cursor": gathered.cursor,
                "mixed_rate": self._mixed_rate(sampled, state.mixed_rate),
                "questions": self.questions,
                "metrics": metrics,
                "rules": self.rules,
            } | _in_flight(gathered.in_flight)
            if self.earlier_rules:
                meta["earlier_rules"] = self.earlier_rules
            self.folder.check_is_open()
            write_ledger(path, kept, fates=fates, meta=meta)
        return gathered.num_tokens

    def _gather(self, step: int, state: CollectorState) -> Gathered:
        """Run rounds until the step has its quota, or ``rollout.max_rounds``."""
        quota = self.settings.questions_per_step
        oldest = step - 1 - self.settings.max_staleness
        mixed = self._trainable(state.surplus, oldest)
        sampled: list[Group] = []
        cursor, mixed_rate, num_rounds, num_tokens = state.cursor, state.mixed_rate, 0, 0
        while len(mixed) < quota and num_rounds < self.settings.max_rounds:
            missing = quota - len(mixed)
            label = f"round {num_rounds + 1}, {len(mixed)}/{quota} mixed"
            asked = self.rounds.ask(step, num_rounds, cursor, self._round_size(missing, mixed_rate), missing, label)
            cursor += asked.num_asked
            num_rounds += 1
            num_tokens += asked.new_tokens
            sampled += asked.groups
            if asked.groups and not any(group.num_correct for group in asked.groups):
                log.warning("step %d, round %d: no right answer (%s)", step, num_rounds, describe_verdicts(asked.groups))
            mixed += self._trainable(asked.groups, oldest)
            mixed_rate = self._mixed_rate(sampled, mixed_rate)
        if 0 < len(mixed) < quota:
            log.warning("step %d trains on %d of %d questions: %d rounds found no more", step, len(mixed), quota, num_rounds)
        num_too_old = sum(
            len(group.answers) - len(without_older(group, oldest).answers) for group in [*state.surplus, *sampled]
        )
        metrics: MetricsRow = {"rounds": num_rounds, "groups_abandoned": cursor - state.cursor - len(sampled)}
        return Gathered(sampled, mixed, min(len(mixed), quota), num_too_old, cursor, num_tokens, metrics)

    def _mixed_rate(self, sampled: Sequence[Group], before: float | None) -> float | None:
        return sum(group.is_mixed for group in sampled) / len(sampled) if sampled else before

    def _trainable(self, groups: Iterable[Group], oldest: int) -> list[Group]:
        """The groups that may be trained on, with only their answers of version ``oldest`` or later."""
        recent = [without_older(group, oldest) for group in groups]
        return [group for group in recent if group.is_mixed or (group.num_judged and not self.filters_prompts)]

    def _round_size(self, missing: int, mixed_rate: float | None) -> int:
        """How many questions to ask to get ``missing`` mixed ones: enough in five rounds of six, at most ``oversample`` times.

        If a share p is mixed, n questions give np ± sqrt(np(1−p)) mixed ones; n is chosen so that one standard deviation below
        the mean still suffices.
        """
        if not self.filters_prompts:
            return missing
        most = math.ceil(missing * self.settings.oversample)
        if mixed_rate is None:
            return most
        rate = max(mixed_rate, 1 / self.settings.oversample)
        return min(most, math.ceil((missing + math.sqrt(missing * (1 - rate))) / rate))


def without_older(group: Group, oldest: int) -> Group:
    """``group`` without answers from weights before version ``oldest``; its r̂ then covers only the remaining answers."""
    return replace(group, answers=tuple(answer for answer in group.answers if answer.completion.weight_version >= oldest))
