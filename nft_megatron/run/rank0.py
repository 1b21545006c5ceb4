"""The services that rank 0 runs in addition to its part of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nft_megatron.collect.collector import Collector
from nft_megatron.evaluate.run import Evaluation
from nft_megatron.observe.metrics import MetricsLog, MetricsRow
from nft_megatron.observe.progress import Progress


@dataclass(frozen=True)
class Rank0Services:
    """``evaluate`` is None without held-out questions, ``probe`` without a log-prob probe; ``probe(version)`` sends the engine
    fixed questions and returns a ledger of its answers. ``fleet`` returns the servers' metrics since the last call, empty for
    the embedded engine.
    """

    collector: Collector
    evaluate: Callable[[Progress], Evaluation] | None
    probe: Callable[[int], Path] | None
    fleet: Callable[[], MetricsRow]
    metrics: MetricsLog

    def measure(self, step: int, progress: Progress) -> MetricsRow:
        """The metrics of an evaluation of the weights after ``step``; none without held-out questions."""
        if self.evaluate is None:
            return {}
        result = self.evaluate(progress)
        if step == 0:
            return {"eval_accuracy_initial": result.accuracy}
        return {
            "eval_accuracy": result.accuracy,
            "eval_answer_length_mean": result.answer_length_mean,
            "eval_truncated_rate": result.truncated_rate,
            "eval_unknown_rate": result.unknown_rate,
        }
