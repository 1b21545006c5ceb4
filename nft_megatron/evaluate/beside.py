"""Several models side by side: their scores with standard errors and seeds, and how each differs from the one just measured.

A ``summary.json`` has the share of right answers to every question, so that two evaluations of the same questions are
compared question by question (:mod:`~nft_megatron.evaluate.paired`). Evaluations of one model that differ in their seed alone
are pooled: more answers per question.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nft_megatron.base.errors import UserError
from nft_megatron.base.untrusted import parse_json
from nft_megatron.evaluate.benchmarks import BENCHMARKS
from nft_megatron.evaluate.paired import PairedDifference, mean_difference, paired_difference
from nft_megatron.evaluate.table import aligned

TITLES = {benchmark.name: benchmark.title for benchmark in BENCHMARKS}
_SETTINGS = ("grader", "rules", "sampling")


@dataclass(frozen=True)
class Answered:
    """One model's judged answers to a benchmark: for each question how many are right, and how many were judged.

    ``questions`` is a hash of all ids and golds: equal hashes mean the same questions.

    >>> Answered("9f2c", {"q0": (3, 4), "q1": (0, 4)}).shares
    {'q0': 0.75, 'q1': 0.0}
    """

    questions: str
    counts: Mapping[str, tuple[int, int]]

    @property
    def shares(self) -> dict[str, float]:
        """The share of right answers to every question with judged answers."""
        return {question: right / judged for question, (right, judged) in self.counts.items() if judged}

    @property
    def scores(self) -> tuple[float, float]:
        """avg@k and its standard error in percent; NaN without enough questions."""
        shares = list(self.shares.values())
        error = 100 * float(np.std(shares, ddof=1)) / math.sqrt(len(shares)) if len(shares) > 1 else math.nan
        return (100 * sum(shares) / len(shares) if shares else math.nan), error

    def to_json(self) -> dict[str, Any]:
        """As ``summary.json`` has it; :meth:`from_json` reads it.

        >>> Answered("9f2c", {"q0": (3, 4)}).to_json()
        {'questions': '9f2c', 'right': {'q0': '3/4'}}
        """
        return {"questions": self.questions, "right": {question: f"{r}/{n}" for question, (r, n) in self.counts.items()}}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Answered:
        """Raises :class:`ValueError` or :class:`TypeError` for anything else."""
        counts = {}
        for question, text in dict(content["right"]).items():
            right, judged = map(int, text.split("/"))
            if not 0 <= right <= judged:
                raise ValueError(f"{question}: {text} is no share")
            counts[question] = (right, judged)
        return cls(str(content["questions"]), counts)


def answered(golds: Iterable[tuple[str, str]], counts: Mapping[str, tuple[int, int]]) -> Answered:
    """``counts`` by question, with the hash of the (question id, gold) pairs, which any order gives."""
    digest = hashlib.sha256("".join(f"{question}\0{gold}\0" for question, gold in sorted(golds)).encode())
    return Answered(digest.hexdigest()[:16], counts)


@dataclass(frozen=True)
class Scores:
    """A row of the comparison: a model's avg@k in percent, published or measured.

    ``errors`` are standard errors in points. ``seeds``, ``settings`` and ``answers`` are those of an evaluation: the seeds
    of its answers, how they were sampled and judged, and the counts by benchmark.
    """

    name: str
    scores: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    answers: Mapping[str, Answered] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """NaN unless all six scores are there."""
        known = [self.scores[name] for name in TITLES if name in self.scores]
        return sum(known) / len(known) if len(known) == len(TITLES) else math.nan


def scores_of(summary: Mapping[str, Any]) -> Scores:
    """The row that a ``summary.json``, or an entry of a list of published scores, stands for."""
    benchmarks = summary.get("benchmarks") or {}
    errors = {name: own["standard_error"] for name, own in benchmarks.items()}
    return Scores(
        str(summary["name"]),
        {name: float(score) for name, score in summary["scores"].items()},
        {name: 100 * float(error) for name, error in errors.items() if error is not None},
        (int(summary["seed"]),) if "seed" in summary else (),
        {key: summary[key] for key in _SETTINGS if key in summary},
        {name: Answered.from_json(own) for name, own in (summary.get("by_question") or {}).items()},
    )


def read_scores(path: Path, field: str = "--beside") -> list[Scores]:
    """The rows in a ``summary.json``, or in a list of objects with ``name`` and ``scores`` (percent by benchmark)."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        return [scores_of(row) for row in (content if isinstance(content, list) else [content])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            field,
            path,
            f"holds no scores ({error})",
            'name the summary.json of another evaluation, or write [{"name": "…", "scores": {"aime24": 30.0}}], in percent',
        ) from error


def pooled(rows: Sequence[Scores]) -> list[Scores]:
    """``rows`` with the evaluations of one model under one set of settings, but with different seeds, made one.

    Benchmarks that not all of them have, or not with the same questions, are left out. A seed that occurs twice counts once.
    """
    groups: dict[str, dict[tuple[int, ...], Scores]] = {}
    for number, row in enumerate(rows):
        key = json.dumps([row.name, row.settings], sort_keys=True) if row.answers and row.seeds else str(number)
        groups.setdefault(key, {}).setdefault(row.seeds, row)
    return [_pool(list(group.values())) for group in groups.values()]


def _pool(rows: Sequence[Scores]) -> Scores:
    if len(rows) == 1:
        return rows[0]
    answers = {}
    for name, first in rows[0].answers.items():
        others = [row.answers[name] for row in rows if name in row.answers and row.answers[name].questions == first.questions]
        if len(others) == len(rows):
            counts = {question: _sum(each.counts.get(question, (0, 0)) for each in others) for question in first.counts}
            answers[name] = Answered(first.questions, counts)
    pooled_scores = {name: own.scores for name, own in answers.items()}
    scores = {name: score for name, (score, _) in pooled_scores.items()}
    errors = {name: error for name, (_, error) in pooled_scores.items()}
    return Scores(rows[0].name, scores, errors, tuple(row.seeds[0] for row in rows), rows[0].settings, answers)


def _sum(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    rights, judged = zip(*counts, strict=True)
    return sum(rights), sum(judged)


def differences(first: Scores, second: Scores) -> dict[str, PairedDifference]:
    """``first`` − ``second`` on every benchmark of which both have answers to the same questions."""
    found = {}
    for name, own in first.answers.items():
        other = second.answers.get(name)
        if other is not None and other.questions == own.questions:
            ours, theirs = own.shares, other.shares
            both = [question for question in ours if question in theirs]
            single = all(counts[question][1] == 1 for counts in (own.counts, other.counts) for question in both)
            found[name] = paired_difference(
                [ours[question] for question in both], [theirs[question] for question in both], single=single
            )
    return found


@dataclass(frozen=True)
class Comparison:
    """``model``, pooled over its seeds, beside ``others``, pooled too; ``rows`` are all of them as they were measured."""

    model: Scores
    others: tuple[Scores, ...]
    rows: tuple[Scores, ...]

    @classmethod
    def of(cls, model: Scores, others: Sequence[Scores]) -> Comparison:
        first, *rest = pooled([model, *others])
        return cls(first, tuple(rest), (model, *others))

    @property
    def deviations(self) -> dict[str, dict[str, float]]:
        """For each model with several seeds, the standard deviation of avg@k between them, in points, by benchmark."""
        found = {}
        for model in (self.model, *self.others):
            own = {row.seeds: row for row in self.rows if (row.name, row.settings) == (model.name, model.settings)}
            if len(model.seeds) > 1:
                scores = {name: [row.answers[name].scores[0] for row in own.values()] for name in model.answers}
                found[model.name] = {name: float(np.std(each, ddof=1)) for name, each in scores.items()}
        return found

    def tables(self) -> str:
        """Scores side by side, the spread between seeds, and the differences from each other model on the same questions."""
        together = [model for model in (self.model, *self.others) if len(model.seeds) > 1]
        parts = [scores_table([*self.rows, *together])]
        parts += [
            f"{name}: standard deviation of avg@k between seeds, in points: "
            + ", ".join(f"{TITLES.get(benchmark, benchmark)} {value:.1f}" for benchmark, value in own.items())
            for name, own in self.deviations.items()
        ]
        parts += [differences_table(self.model, other) for other in self.others]
        return "\n\n".join(part for part in parts if part)

    def to_json(self) -> dict[str, Any]:
        """The differences from each other model, in shares, with their mean, and :attr:`deviations`."""
        models = []
        for other in self.others:
            found = differences(self.model, other)
            named = found | ({"mean": mean_difference(list(found.values()))} if len(found) > 1 else {})
            pairs = {name: {key: _or_none(value) for key, value in asdict(pair).items()} for name, pair in named.items()}
            seeds = {"seeds": list(self.model.seeds), "other_seeds": list(other.seeds)}
            models.append({"name": other.name, **seeds, "differing": differing(self.model, other), "differences": pairs})
        return {"models": models, "deviation_between_seeds": self.deviations}


def differing(first: Scores, second: Scores) -> list[str]:
    """What differs in how two models' answers were sampled and judged, apart from the tokens that end an answer."""
    ours, theirs = ({**row.settings, **row.settings.get("sampling", {})} for row in (first, second))
    keys = sorted((ours.keys() | theirs.keys()) - {"sampling", "stop_token_ids"})
    return [f"{key} {ours.get(key)} and {theirs.get(key)}" for key in keys if ours.get(key) != theirs.get(key)]


def scores_table(rows: Sequence[Scores]) -> str:
    """avg@k side by side; benchmarks that are none of the paper's come last and are not in the mean."""
    names = [*TITLES, *sorted({name for row in rows for name in row.scores} - TITLES.keys())]
    head = ("avg@k ± s.e.", "seeds", *(TITLES.get(name, name) for name in names), "mean")
    body = [
        (row.name, ", ".join(map(str, row.seeds)), *(_score(row, name) for name in names), points(row.mean)) for row in rows
    ]
    return aligned([head, *body])


def _score(row: Scores, name: str) -> str:
    error = row.errors.get(name, math.nan)
    return points(row.scores.get(name, math.nan)) + ("" if math.isnan(error) else f" ± {error:.1f}")


def differences_table(first: Scores, second: Scores) -> str:
    """The paired differences of two models in points, a line a benchmark; empty if they share no questions."""
    found = differences(first, second)
    if not found:
        return ""
    rows: list[tuple[str, ...]] = [("", "questions", "difference", "± s.e.", "95 %", "better on", "worse on", "p", "test")]
    rows += [_difference_row(TITLES.get(name, name), pair) for name, pair in found.items()]
    if len(found) > 1:
        rows.append(_difference_row(f"mean of {len(found)}", mean_difference(list(found.values()))))
    note = "".join(f"; {each}" for each in differing(first, second))
    return f"{first.name} − {second.name} on the same questions, in points{note}\n{aligned(rows)}"


def _difference_row(title: str, pair: PairedDifference) -> tuple[str, ...]:
    low, high = (points(100 * bound, sign=True) for bound in (pair.low, pair.high))
    return (
        title,
        str(pair.questions),
        points(100 * pair.difference, sign=True),
        points(100 * pair.standard_error),
        f"{low} … {high}",
        str(pair.only_first),
        str(pair.only_second),
        "–" if math.isnan(pair.p_value) else f"{pair.p_value:.3f}" if pair.p_value >= 0.001 else f"{pair.p_value:.0e}",
        pair.test,
    )


def _or_none(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


def points(percent: float, *, sign: bool = False) -> str:
    """A percentage for a table; a dash for NaN."""
    return "–" if math.isnan(percent) else f"{percent:+.1f}" if sign else f"{percent:.1f}"
