"""What an evaluation reports besides its answers: the printed table, and ``summary.json`` with the same numbers.

Shares are printed in percent. A benchmark's row has avg@k and its standard error, pass@k and maj@k of all k answers, the share
of answers cut off at the length limit, and the mean length in tokens. The mean weighs the benchmarks equally, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nft_megatron.evaluate.benchmarks import Benchmark
from nft_megatron.evaluate.beside import Answered, answered, points
from nft_megatron.evaluate.run import Evaluation
from nft_megatron.evaluate.table import aligned
from nft_megatron.verify.reasons import REASONS

_HEAD = ("", "questions", "k", "avg@k", "± s.e.", "pass@k", "maj@k", "cut off", "unknown", "tokens")


def summary_of(results: Sequence[tuple[Benchmark, Evaluation]], overlapping: frozenset[str]) -> dict[str, Any]:
    """Every statistic of every benchmark, with and without its questions in ``overlapping``, and its right answers by question.

    ``scores`` are in percent.
    """
    return {
        "scores": {benchmark.name: 100 * result.accuracy for benchmark, result in results if not math.isnan(result.accuracy)},
        "benchmarks": {benchmark.name: _statistics(result) for benchmark, result in results},
        "not_in_training_data": {
            benchmark.name: _statistics(kept)
            for benchmark, result in results
            if (kept := _kept(result, overlapping)) is not None
        },
        "by_question": {benchmark.name: _answered(result).to_json() for benchmark, result in results},
    }


def _answered(result: Evaluation) -> Answered:
    return answered(((prompt.question_id, prompt.gold) for prompt in result.prompts), result.counts)


def _kept(result: Evaluation, overlapping: frozenset[str]) -> Evaluation | None:
    """``result`` without its questions in ``overlapping``; None if none or all of its questions are."""
    kept = result.without(overlapping)
    return kept if 0 < len(kept.prompts) < len(result.prompts) else None


def _statistics(result: Evaluation) -> dict[str, Any]:
    """Statistics by name; pass@k for k = 1, 2, 4 … and all. Shares are in [0, 1] or None; lengths in tokens."""
    samples = len(result.answers[0])
    counts = sorted({*(2**i for i in range(samples.bit_length())), samples})
    return {
        "questions": len(result.prompts),
        "samples": samples,
        "avg": _or_none(result.accuracy),
        "standard_error": _or_none(result.standard_error),
        "pass": {str(k): _or_none(result.pass_at(k)) for k in counts},
        "maj": _or_none(result.majority),
        "truncated_rate": result.truncated_rate,
        "unknown_rate": result.unknown_rate,
        "answer_length_mean": result.answer_length_mean,
        "reasons": result.reasons,
    }


def table_of(results: Sequence[tuple[Benchmark, Evaluation]], overlapping: frozenset[str]) -> str:
    """The table of all benchmarks; one with questions in ``overlapping`` has a second row that leaves them out."""
    rows: list[tuple[str, ...]] = [_HEAD]
    for benchmark, result in results:
        rows.append(_row(benchmark.title, result))
        if (kept := _kept(result, overlapping)) is not None:
            rows.append(_row("  not in training data", kept))
    mean = sum(result.accuracy for _, result in results) / len(results)
    error = math.sqrt(sum(result.standard_error**2 for _, result in results)) / len(results)  # of independent benchmarks
    rows.append((f"mean of {len(results)}", "", "", _percent(mean), _percent(error), *[""] * 5))
    return aligned(rows)


def _row(title: str, result: Evaluation) -> tuple[str, ...]:
    samples = len(result.answers[0])
    several = (_percent(result.pass_at(samples)), _percent(result.majority)) if samples > 1 else ("", "")
    return (
        title,
        str(len(result.prompts)),
        str(samples),
        _percent(result.accuracy),
        _percent(result.standard_error),
        *several,
        _percent(result.truncated_rate),
        _percent(result.unknown_rate),
        f"{result.answer_length_mean:.0f}",
    )


def reasons_table(results: Mapping[str, Evaluation]) -> str:
    """How many answers have which verdict for which reason, one column for each of ``results`` by title."""
    counts = [result.reasons for result in results.values()]
    rows = [
        (f"{label}: {reason}", *(str(own.get(reason, 0)) for own in counts))
        for reason, (label, _) in REASONS.items()
        if any(reason in own for own in counts)
    ]
    return aligned([("verdict: reason", *results), *rows])


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def _percent(share: float) -> str:
    return points(100 * share)
