"""A training run under way: what happens around Algorithm 1's lines at each step, on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nft_megatron.checkpoints import Checkpoints
from nft_megatron.collect import Collector, CollectorState
from nft_megatron.config import Config
from nft_megatron.errors import StoppedEarly
from nft_megatron.evaluate.run import Evaluation
from nft_megatron.model.control import first_of, on_main
from nft_megatron.model.step import StepBatch, Trainer, UpdateStats
from nft_megatron.model.topology import Topology
from nft_megatron.observe.metrics import MetricsLog, MetricsRow, PhaseTimer
from nft_megatron.observe.progress import Progress
from nft_megatron.publish import Publisher
from nft_megatron.run_folder import RunFolder
from nft_megatron.stop import StopRequests


@dataclass(frozen=True)
class Host:
    """What rank 0 has besides its part of the model. ``evaluate`` is None without held-out questions."""

    collector: Collector
    evaluate: Callable[[], Evaluation] | None
    metrics: MetricsLog


@dataclass(frozen=True)
class Dataset:
    """A step's ledger and the metrics of its collecting."""

    ledger: Path
    metrics: MetricsRow
    generated_tokens: int


@dataclass
class Run:
    """``step`` counts the finished steps. ``host`` is None but on rank 0."""

    config: Config
    folder: RunFolder
    topology: Topology
    trainer: Trainer
    publisher: Publisher
    checkpoints: Checkpoints
    timer: PhaseTimer
    progress: Progress
    stop: StopRequests
    host: Host | None
    step: int = 0
    collected: CollectorState = field(default_factory=CollectorState)
    _initial: MetricsRow = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        """Show the phase and count its time."""
        self.progress.phase(name, total)
        with self.timer.phase(name):
            yield

    def start(self) -> None:
        """Resume from the newest checkpoint, give the engine its weights, evaluate the model that nothing has trained yet."""
        self.step, collected = self.checkpoints.restore()
        self.collected = collected or self.collected
        self.publisher.publish(version=self.step)
        on_main(self.topology, self._forget_later_metrics)
        if self.step == 0 and (result := self._evaluate()):
            self._initial = {"eval_accuracy_initial": result["eval_accuracy"]}
        self.timer.finish_step(generated_tokens=0, trained_tokens=0)  # the set-up belongs to no step

    def _forget_later_metrics(self) -> None:
        """Rows of steps after the checkpoint: those steps are trained again, with the same outcome."""
        assert self.host is not None
        self.host.metrics.truncate_from(self.step + 1)

    def collect(self, step: int) -> Dataset:
        """The step's ledger, filled by rank 0 while the others wait."""

        def action() -> Dataset:
            assert self.host is not None
            collected = self.host.collector.collect(step, self.collected)
            self.collected = collected.state
            return Dataset(collected.ledger, collected.metrics, collected.generated_tokens)

        return on_main(self.topology, action)

    def after_step(self, step: int, dataset: Dataset, batch: StepBatch, updates: Sequence[UpdateStats]) -> None:
        """Evaluate when it is due, write the metrics, save when it is due or somebody asked to stop.

        Metrics come before the checkpoint: a run killed between the two repeats the step and writes the same row again. The
        time of saving is part of the next step's row.
        """
        self.step = step
        is_last = step == self.config.train.num_steps
        row = {"step": step} | dataset.metrics | batch.metrics | self.trainer.summary(updates)
        if step % self.config.evaluate.every == 0 or is_last:
            row |= self._evaluate()
        num_tokens = {"generate": dataset.generated_tokens, "update": sum(update.num_tokens for update in updates)}
        on_main(self.topology, lambda: self._write_row(row, num_tokens))
        if row["skipped_updates"] == len(updates):
            raise RuntimeError(f"step {step}: no update had a finite gradient; the run ends before it wastes more time")
        reason = first_of(self.topology, self.stop.reason())
        with self.phase("save"):
            if step % self.config.checkpoint.every == 0 or is_last or reason:
                self.checkpoints.save(step, self.collected)
            if self.config.checkpoint.export_every and step % self.config.checkpoint.export_every == 0:
                self.publisher.export(self.folder.export(step))
        if reason:
            self.stop.clear()
        if reason and not is_last:
            raise StoppedEarly(
                f"stopped after step {step} by {reason}; everything is saved, the same command goes on from there"
            )

    def _evaluate(self) -> MetricsRow:
        """Held-out metrics of the current weights on every rank, empty without held-out questions."""

        def action() -> MetricsRow:
            assert self.host is not None
            if self.host.evaluate is None:
                return {}
            result = self.host.evaluate()
            return {
                "eval_accuracy": result.accuracy,
                "eval_answer_length_mean": result.answer_length_mean,
                "eval_truncated_rate": result.truncated_rate,
                "eval_unknown_rate": result.unknown_rate,
            }

        with self.timer.phase("evaluate"):
            return on_main(self.topology, action)

    def _write_row(self, row: MetricsRow, num_tokens: dict[str, int]) -> None:
        """Write the step's row with its timings."""
        assert self.host is not None
        timings: MetricsRow = dict(
            self.timer.finish_step(generated_tokens=num_tokens["generate"], trained_tokens=num_tokens["update"])
        )
        row = row | self._initial | timings
        self.host.metrics.write(row)
        self.progress.step_done(row)
        self._initial = {}

    def finish(self) -> None:
        """Export the trained model. A second call finds it there."""
        self.publisher.export(self.folder.export(self.step))
