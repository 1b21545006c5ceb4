"""A training run in progress: what happens around Algorithm 1's lines at each step, on every rank."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from nft_megatron.base.background import in_background
from nft_megatron.base.errors import StoppedEarly, UserError
from nft_megatron.base.garbage import collected_afterwards
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.batching.batch import MiniBatch
from nft_megatron.collect.async_collector import AsyncCollector
from nft_megatron.collect.collector import CollectorState, Dataset
from nft_megatron.config.schema import Config
from nft_megatron.lifecycle.stop_requests import StopRequests
from nft_megatron.lifecycle.watchdog import Watchdog
from nft_megatron.model.control import first_of, on_main
from nft_megatron.model.step import StepBatch, Trainer
from nft_megatron.model.topology import Topology
from nft_megatron.model.update_stats import UpdateStats
from nft_megatron.observe.metrics import MetricsRow, PhaseTimer
from nft_megatron.observe.progress import Progress
from nft_megatron.run.checkpoints import Checkpoints
from nft_megatron.run.rank0 import Rank0Services
from nft_megatron.run.retention import remove_old_exports
from nft_megatron.run.weight_sync import WeightSync

log = logging.getLogger(__name__)

WATCHED_AS = {"prepare": "update"}
"""Phases that share the deadline of another one."""
UNWATCHED = "wait"
"""Waiting for rank 0 or its background work: limited by rollout.step_deadline_seconds."""


@dataclass
class Run:
    """``step`` counts the finished steps. ``rank0`` is None on all other ranks."""

    config: Config
    folder: RunFolder
    topology: Topology
    trainer: Trainer
    weight_sync: WeightSync
    checkpoints: Checkpoints
    timer: PhaseTimer
    progress: Progress
    watchdog: Watchdog
    stop: StopRequests
    rank0: Rank0Services | None
    step: int = 0
    collected: CollectorState = field(default_factory=CollectorState)
    _notes: MetricsRow = field(default_factory=dict)
    """Metrics measured between steps, for the next row."""
    _ahead: AsyncCollector | None = None
    _evaluation: Future[MetricsRow] | None = None
    _evaluates_concurrently: bool = False
    _update: int = 0
    """The current step's update, counted from 1."""
    _num_skipped: int = 0
    """Skipped updates in a row, up to the last one."""
    _halted: StoppedEarly | None = None
    """Raised by a wait for servers after a step was trained: the step is saved first."""

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        """Show the phase, count its time, watch it, remember how long it took."""
        self.progress.phase(name, total)
        with self.timer.phase(name), self.watchdog.phase(WATCHED_AS.get(name, name)), self.stop.limit.measuring(name):
            yield

    def start(self) -> None:
        """Resume from the newest checkpoint, give the engine its weights, evaluate the untrained model."""
        self.step, collected = self.checkpoints.restore()
        self.collected = collected or self.collected
        self.progress.begin(self.step)
        try:
            self._begin()
        except StoppedEarly:  # while it waited for servers
            self.stop.clear()
            raise

    def _begin(self) -> None:
        self.publish(self.step)
        on_main(self.topology, self._forget_later_metrics)
        self._evaluates_concurrently = on_main(self.topology, self._may_evaluate_beside)
        if self.step == 0:
            self._evaluate()
        elif self._is_due_beside(self.step):
            self._begin_evaluation()  # the process that should have put it into the next row has ended
        self.timer.finish_step(generated_tokens=0, trained_tokens=0)  # the set-up belongs to no step
        on_main(self.topology, self._start_collecting)

    def _may_evaluate_beside(self) -> bool:
        """Whether evaluations run while the next step is collected and trained."""
        return self.rank0 is not None and self.rank0.evaluate is not None and self.rank0.collector.client.engine.overlaps

    def _is_due_beside(self, step: int) -> bool:
        """Not in the last step, whose row comes too early, nor in the step before it: the last row has its own evaluation."""
        is_due = step % self.config.evaluate.every == 0 and step < self.config.train.num_steps - 1
        return is_due and self._evaluates_concurrently

    def _start_collecting(self) -> None:
        assert self.rank0 is not None
        if self.config.rollout.max_staleness and self.step < self.config.train.num_steps:
            last = self.config.train.num_steps
            self._ahead = AsyncCollector(self.rank0.collector, self.collected, version=self.step, last_step=last)

    def close(self) -> None:
        """End the background work; the engine is closed after that."""
        self.checkpoints.close()
        if self._ahead is not None:
            self._ahead.close()

    def _forget_later_metrics(self) -> None:
        """Drop the rows of steps after the checkpoint: those steps are retrained with the same outcome."""
        assert self.rank0 is not None
        self.rank0.metrics.truncate_from(self.step + 1)

    def collect(self, step: int) -> Dataset:
        """The step's ledger, filled by rank 0 while the others wait.

        Raises :class:`StoppedEarly`, with the finished steps and groups saved, after a stop request, or if the time left is too
        short for the step's updates.
        """
        self.watchdog.note = f"of step {step}"
        self.stop.limit.phases = self._phases_of(step)

        def action() -> Dataset:
            assert self.rank0 is not None
            if self._ahead is None:
                dataset, state = self.rank0.collector.collect(step, self.collected)
            else:
                with self.phase("generate"):
                    dataset, state = self._ahead.take(step, self.config.rollout.step_deadline_seconds, self.stop.reason)
            if reason := self.stop.limit.reason():
                raise StoppedEarly(f"stopped before the updates of step {step} by {reason}; the same command resumes it")
            self.collected = state
            return dataset

        try:
            with self.watchdog.phase("collect" if self.rank0 is not None and self._ahead is None else UNWATCHED):
                return on_main(self.topology, action)
        except StoppedEarly:
            self._finish_saving()
            if on_main(self.topology, self.folder.latest_step) != self.step > 0:
                self._save()
                self._finish_saving()
            self.stop.clear()
            raise

    def _phases_of(self, step: int) -> tuple[str, ...]:
        """The phases of ``step`` after its collecting, including its checkpoint."""
        is_evaluated = step == self.config.train.num_steps or step % self.config.evaluate.every == 0
        waits = ("evaluate",) if is_evaluated or self._is_due_beside(step - 1) else ()
        saves = ("checkpoint",) * (2 if self.checkpoints.is_pending else 1)
        return ("prepare", "update", "publish", *waits, *saves)

    def prepare(self, dataset: Dataset, step: int) -> StepBatch:
        """Balance the step over ranks, pack it, recompute old log-probs; refuse answers of another policy."""
        self._update = 0
        with self.phase("prepare"), collected_afterwards():
            batch = self.trainer.prepare(dataset.ledger, step)
        self._check_mismatch(batch.metrics, f"the answers of step {step}")
        return batch

    def update(self, minibatch: MiniBatch) -> UpdateStats:
        """One optimizer step. Raises after ``train.max_skipped_updates`` non-finite updates in a row."""
        self._update += 1
        with collected_afterwards():
            stats = self.trainer.update(minibatch)
        if minibatch.measures_mismatch:  # nothing of this step is saved or published yet
            self._check_mismatch(stats.policy.mismatch.metrics(), f"the first mini-batch of step {self.step + 1}")
        self._num_skipped = self._num_skipped + 1 if stats.applied.problem else 0
        if self._num_skipped == self.config.train.max_skipped_updates:
            raise RuntimeError(
                f"update {self._update} of step {self.step + 1}: {stats.applied.problem}; {self._num_skipped} updates in a row "
                "(train.max_skipped_updates) were skipped for this, and the run ends before it wastes more time"
            )
        self.progress.advance()
        return stats

    def publish(self, version: int) -> None:
        """π ← π_θ⁺: the trained weights to the engine, verified by the log-prob probe if there is one.

        If servers are awaited too long or the run is asked to stop meanwhile, :meth:`after_step` saves the step and ends it.
        """
        with self._saving_first(is_trained=version > self.step):
            self._finish_evaluation()  # it evaluates the weights before these
            with self.phase("publish"):
                self.weight_sync.publish(version)
                self._check_probe(version)
            if self._ahead is not None:
                self._ahead.published(version)

    @contextlib.contextmanager
    def _saving_first(self, is_trained: bool) -> Iterator[None]:
        """If waiting for servers ends the run, remember it until :meth:`after_step` has saved the step that is trained."""
        try:
            yield
        except StoppedEarly as error:
            if not is_trained:
                raise
            self._halted = error

    def _check_probe(self, version: int) -> None:
        def ask() -> Path | None:
            assert self.rank0 is not None
            return self.rank0.probe(version) if self.rank0.probe is not None else None

        if (answers := on_main(self.topology, ask)) is not None:
            measured = self.trainer.mismatch(answers, version + 1)
            self._notes |= {"gate_mean": measured["mismatch_mean"], "gate_max": measured["mismatch_max"]}
            self._check_mismatch(measured, f"the probe's answers of version {version}")

    def _check_mismatch(self, measured: MetricsRow, what: str) -> None:
        limit, mean = self.config.rollout.max_mismatch, measured["mismatch_mean"]
        if not mean <= limit:  # type: ignore[operator]  # NaN is refused too
            raise UserError(
                "rollout.max_mismatch",
                limit,
                f"in {what} the log-probs of engine and trainer differ by {mean:.3g} nats on average, "
                f"at most {measured['mismatch_max']:.3g}",
                "check that the engine serves this model in this dtype, without top-p or penalties, or raise the limit",
            )

    def after_step(self, step: int, dataset: Dataset, batch: StepBatch, updates: Sequence[UpdateStats]) -> None:
        """Evaluate if due, write the metrics, save if due or after a stop request.

        Metrics come before the checkpoint: a run killed between the two repeats the step and writes the same row again. The
        time of saving counts towards the next step's row.
        """
        self.step = step
        if self.checkpoints.is_written():
            self._finish_saving()
        is_last = step == self.config.train.num_steps
        is_due = is_last or (step % self.config.evaluate.every == 0 and not self._is_due_beside(step))
        if is_due and self._halted is None:
            with self._saving_first(is_trained=True):
                self._evaluate()
        if is_due and self._halted is not None:
            log.warning("step %d is not evaluated: %s", step, self._halted)
        row = {"step": step} | dataset.metrics | self.trainer.summary(batch, updates)
        num_tokens = {"generate": dataset.generated_tokens, "update": sum(update.num_tokens for update in updates)}
        on_main(self.topology, lambda: self._write_row(row, num_tokens))
        self.stop.limit.phases = self._phases_of(step + 1)
        reason = first_of(self.topology, self.stop.reason())
        is_asked = on_main(self.topology, self.folder.save_request.exists)
        if step % self.config.checkpoint.every == 0 or is_last or reason or is_asked or self._halted:
            self._save()
        if is_last or reason or is_asked or self._halted:
            self._finish_saving()
            on_main(self.topology, lambda: self.folder.save_request.unlink(missing_ok=True))
        if self.config.checkpoint.export_every and step % self.config.checkpoint.export_every == 0:
            with self.phase("save"):
                self._export(step)
        if reason or self._halted:
            self.stop.clear()
        if self._halted and not is_last:
            raise StoppedEarly(f"step {step} is saved; {self._halted}") from self._halted
        if reason and not is_last:
            raise StoppedEarly(
                f"stopped after step {step} by {reason}; everything is saved, the same command resumes from there"
            )
        if self._is_due_beside(step):
            self._begin_evaluation()

    def _export(self, step: int) -> None:
        self.weight_sync.export(self.folder.export(step))
        on_main(self.topology, lambda: remove_old_exports(self.folder, self.config.checkpoint.keep_exports))

    def _evaluate(self) -> None:
        """Measure the current weights on held-out questions, if any, for the next row."""
        watched = self.watchdog.phase("evaluate" if self.rank0 is not None else UNWATCHED)
        with self.timer.phase("evaluate"), watched, self.stop.limit.measuring("evaluate"):
            self._notes |= on_main(self.topology, self._measure)

    def _measure(self) -> MetricsRow:
        assert self.rank0 is not None
        return self.rank0.measure(self.step, self.progress)

    def _begin_evaluation(self) -> None:
        """The same, concurrently with the next step, whose row gets the results."""
        step, rank0 = self.step, self.rank0
        if rank0 is not None:
            self._evaluation = in_background("evaluate", lambda: rank0.measure(step, Progress()) | {"eval_step": step})

    def _finish_evaluation(self) -> None:
        """Wait for the pending evaluation, if any."""

        def result() -> MetricsRow:
            evaluation, self._evaluation = self._evaluation, None
            if evaluation is None:
                return {}
            with self.stop.limit.measuring("evaluate"):
                return evaluation.result(self.config.rollout.step_deadline_seconds)

        with self.timer.phase("evaluate"), self.watchdog.phase(UNWATCHED):
            self._notes |= on_main(self.topology, result)

    def _write_row(self, row: MetricsRow, num_tokens: dict[str, int]) -> None:
        """Write the step's row with its timings."""
        assert self.rank0 is not None
        self.folder.check_is_open()
        timings: MetricsRow = dict(
            self.timer.finish_step(generated_tokens=num_tokens["generate"], trained_tokens=num_tokens["update"])
        )
        row = row | self._notes | timings | self.rank0.fleet()
        self.rank0.metrics.write(row)
        self.progress.step_done(row)
        self._notes = {}

    def _save(self) -> None:
        self._finish_saving()
        with self.phase("save"):
            self.checkpoints.save(self.step, self.collected)

    def _finish_saving(self) -> None:
        """Wait for the checkpoint that is still being written, if any; raises its error."""
        if self.checkpoints.is_pending:
            with self.phase("save"):
                seconds = self.checkpoints.finish()
            self.stop.limit.measured("checkpoint", seconds)

    def finish(self) -> None:
        """Export the trained model unless it is already exported."""
        self._export(self.step)
