"""The metrics of a rollout step: their names, where they are written, and the clock behind the timings.

A step's metrics are one flat dict. ``METRICS`` is the single source of the names, units and meanings; the report and the
documentation print it. Names that begin with ``time/``, ``ahead/``, ``tokens_per_second/``, ``fleet/`` or ``server/`` depend on
the clock; everything else repeats to the bit when a run is killed and resumed on one layout.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.errors import UserError
from nft_megatron.base.untrusted import parse_json
from nft_megatron.observe.sinks import TensorBoardSink, WandbSink
from nft_megatron.verify.reasons import REASONS

MetricValue = float | int | list[int]
MetricsRow = dict[str, MetricValue]

PHASES = ("generate", "verify", "prepare", "update", "publish", "ledger", "evaluate", "save", "other")
"""Every second of a rollout step belongs to exactly one of these; ``other`` is what no phase claimed."""

WALL_CLOCK_PREFIXES = ("time/", "tokens_per_second/", "ahead/", "fleet/", "server/")


RATE_BUCKETS = ("0.0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1.0")
"""Equal ranges of r̂, each without its upper end but the last."""


def is_wall_clock(name: str) -> bool:
    """Whether a metric depends on the machine's speed, so that it differs between two otherwise equal runs."""
    return name.startswith(WALL_CLOCK_PREFIXES)


@dataclass(frozen=True)
class Metric:
    """One name of a metrics row. A ``unit`` of "1" is a plain number; "share" lies in [0, 1]."""

    name: str
    unit: str
    meaning: str

    @property
    def is_wall_clock(self) -> bool:
        """:func:`is_wall_clock` of its name."""
        return is_wall_clock(self.name)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("step", "1", "rollout step, counted from 1; the number in the names of its ledger and checkpoint"),
        Metric("updates", "count", "optimizer steps since the start of the run, including this rollout step's"),
        Metric("loss", "1", "the objective, averaged over the step's updates"),
        Metric("loss_positive", "1", "the part of the loss that right answers contribute"),
        Metric("loss_negative", "1", "the part of the loss that wrong answers contribute"),
        Metric("grad_norm", "1", "gradient norm before clipping, mean over the step's updates"),
        Metric("grad_norm_max", "1", "gradient norm before clipping, largest of the step's updates"),
        Metric("learning_rate", "1", "learning rate of the step's last update"),
        Metric(
            "entropy",
            "nats",
            "entropy of the policy, mean over trained tokens: before the step's first update; of answers whose old log-probs "
            "are the engine's (from older weights, train.old_logprobs=engine) during their own update",
        ),
        Metric(
            "entropy_sampled",
            "nats",
            "entropy estimated from all sampled answers, right, wrong and filtered: mean of −log π(a_t)",
        ),
        Metric("kl_old", "nats", "KL divergence to the policy that generated the answers, estimated on trained tokens"),
        Metric(
            "mismatch_mean",
            "nats",
            "|engine log-prob − trainer log-prob| under the same weights, mean over trained tokens; for answers from older "
            "weights (rollout.max_staleness > 0) π_old is the engine's, for all others the trainer's; with "
            "train.old_logprobs=engine over the first update's tokens",
        ),
        Metric("mismatch_max", "nats", "the same, largest"),
        Metric("mismatch_kl", "nats", "KL divergence of the trainer from the engine that generated the answers, per token"),
        Metric("mismatch_ess", "share", "effective sample size of the importance weights trainer / engine over trained tokens"),
        Metric("ratio_max", "1", "largest R_t = π⁺(a_t) / π(a_t) over the step's trained tokens"),
        Metric("clamp_rate", "share", "tokens of wrong answers whose negative ratio (1 - r̂R)/(1 - r̂) was raised to ε"),
        *(
            Metric(
                f"{name}/{bucket}",
                unit,
                f"{meaning}, questions with r̂ from {bucket.replace('-', ' to ')}; absent where there are none",
            )
            for name, unit, meaning in (
                ("clamp_rate", "share", "the same"),
                ("negative_ratio", "1", "mean of (1 - r̂R)/(1 - r̂) over tokens of wrong answers"),
                ("gradient_share", "share", "share of Σ |∂loss/∂log π(a_t)| over tokens, summed over the step's updates"),
            )
            for bucket in RATE_BUCKETS
        ),
        Metric(
            "gradient_cosine",
            "1",
            "cosine between the gradients of right and wrong answers, before the step's first update; "
            "every observe.gradient_cosine_every steps",
        ),
        Metric("skipped_updates", "count", "updates skipped because the loss or the gradient was not finite"),
        Metric("accuracy", "share", "right answers among all judged answers, before the prompt filter"),
        Metric("groups_sampled", "count", "questions that were answered"),
        Metric("groups_mixed", "count", "questions with 0 < r̂ < 1"),
        Metric("groups_abandoned", "count", "questions sent but abandoned: the quota was met, or all their verdicts agreed"),
        Metric(
            "answers_too_old", "count", "answers dropped because their weights were older than rollout.max_staleness allows"
        ),
        Metric("groups_trained", "count", "questions trained on"),
        Metric(
            "groups_surplus",
            "count",
            "mixed questions beyond the quota; kept for a later step only where rollout.max_staleness allows",
        ),
        Metric(
            "questions_conflicting",
            "count",
            "questions dropped from the data set: the same question also appears with another gold answer",
        ),
        Metric("questions_overlong", "count", "questions dropped from the data set: longer than data.max_prompt_tokens"),
        Metric("questions_unmatched", "count", "questions dropped from the data set: right answers may not match their gold"),
        Metric("correct_rate_histogram", "counts", "questions by r̂ in K+1 bins from 0 to 1, over all questions answered"),
        Metric("truncated_rate", "share", "answers cut at the length limit"),
        Metric("answer_length_mean", "tokens", "mean length of an answer"),
        Metric("answer_length_p90", "tokens", "90th percentile of answer length"),
        Metric("answer_length_max", "tokens", "length of the longest answer"),
        Metric("unknown_rate", "share", "answers that could not be judged; they count neither as right nor as wrong"),
        *(
            Metric(f"verdict/{reason}", "share", f"answers judged {label}: {meaning}; absent where there are none")
            for reason, (label, meaning) in REASONS.items()
        ),
        Metric("groups_in_flight", "count", "questions of a stream that were in flight when this step's ledger was written"),
        Metric("rounds", "count", "generation rounds until the quota of mixed questions was met"),
        Metric("staleness_max", "steps", "age of the oldest weights that generated a trained answer"),
        Metric("response_tokens", "tokens", "tokens generated for this step"),
        Metric("trained_tokens", "tokens", "answer tokens that enter the loss"),
        Metric(
            "gate_mean", "nats", "|engine log-prob − trainer log-prob| on fixed prompts after this step's weight sync, mean"
        ),
        Metric("gate_max", "nats", "the same, largest"),
        Metric("eval_accuracy", "share", "held-out accuracy of the weights after this step, or after eval_step"),
        Metric(
            "eval_step",
            "1",
            "step whose weights were evaluated, if evaluation overlapped a later step; absent: this row's step",
        ),
        Metric("eval_accuracy_initial", "share", "held-out accuracy before the first step; only in the row of step 1"),
        Metric("eval_answer_length_mean", "tokens", "mean length of a held-out answer"),
        Metric("eval_truncated_rate", "share", "held-out answers cut at the length limit"),
        Metric("eval_unknown_rate", "share", "held-out answers that could not be judged"),
        Metric("time/generate", "s", "waiting for answers"),
        Metric(
            "time/verify",
            "s",
            "waiting for verdicts after the last answer arrived; verification during generation is not counted",
        ),
        Metric("time/prepare", "s", "balancing, packing, computing the old log-probs"),
        Metric("time/update", "s", "forward, backward and optimizer step of all updates"),
        Metric("time/publish", "s", "sending new weights to the engines"),
        Metric("time/ledger", "s", "writing and reading the step's answers"),
        Metric("time/evaluate", "s", "held-out evaluation"),
        Metric("time/save", "s", "waiting for checkpoints and exports; background writes are not counted"),
        Metric("time/other", "s", "everything else in the step"),
        Metric("time/step", "s", "the whole step: the sum of the phases"),
        Metric("ahead/collect", "s", "collecting this step's answers during earlier training (rollout.max_staleness > 0)"),
        Metric("ahead/wait", "s", "the collector's wait for sufficiently recent weights before it began"),
        Metric("fleet/healthy", "count", "servers that can serve at the end of the step"),
        Metric(
            "fleet/tokens_per_second",
            "tokens/s",
            "tokens from all servers / time of the whole step; server/<name>/… for one server",
        ),
        Metric("fleet/idle_share", "share", "share of the servers' time in the step with nothing to generate"),
        Metric("fleet/wasted_tokens", "tokens", "generated but not used: cut off at the quota, abandoned, retried"),
        Metric("fleet/retries", "count", "answers that had to be requested again"),
        Metric("fleet/restarts", "count", "server restarts since the start of the run"),
        Metric("fleet/sync_seconds", "s", "the slowest server's latest weight sync"),
        Metric("fleet/sync_bytes", "bytes", "size of one version of the weights"),
        Metric("tokens_per_second/generate", "tokens/s", "generated tokens / time/generate"),
        Metric("tokens_per_second/update", "tokens/s", "trained tokens / time/update"),
    )
}


def is_known(name: str) -> bool:
    """Whether ``name`` may stand in a row: it is in ``METRICS``, an evaluation's own (``eval_…``) or a server's.

    >>> is_known("entropy"), is_known("eval_accuracy/math500"), is_known("server/node-3/queue"), is_known("entrophy")
    (True, True, True, False)
    """
    return name in METRICS or name.startswith(("eval_", "server/"))


def read_metrics(run_dir: Path | str) -> list[MetricsRow]:
    """All rows of RUN/metrics.jsonl in file order; an empty list without the file. ``null`` (not finite) becomes NaN.

    A last line without its newline, torn by a killed process, is left out.

    Raises:
        UserError: any complete line is not a JSON object with a ``step``.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        return []
    complete_lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return [_parse_row(path, number, line) for number, line in enumerate(complete_lines, start=1)]


def _parse_row(path: Path, number: int, line: str) -> MetricsRow:
    try:
        row = parse_json(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not all(map(_is_value, row.values())):
        raise UserError("metrics", f"{path}:{number}", "is not a row of metrics", "restore the file or delete that line")
    return {name: math.nan if value is None else value for name, value in row.items()}


def _is_value(value: object) -> bool:
    """Whether a row may hold it: a number, null, or counts."""
    counts = value if isinstance(value, list) else ()
    return value is None or isinstance(value, (int, float)) or (counts is value and all(type(count) is int for count in counts))


def _encode_row(row: Mapping[str, MetricValue]) -> str:
    finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


class MetricsLog:
    """Writes rows to RUN/metrics.jsonl, to TensorBoard (RUN/logs/tensorboard) and to Weights & Biases, where asked for.

    A row is on the disk when :meth:`write` returns. A number that is not finite is written as ``null``, which keeps the file
    valid JSON. To resume, call :meth:`truncate_from` with the first step that will be written again.

    Raises:
        UserError: ``wandb_project`` is set and the package ``wandb`` is not installed.
    """

    def __init__(self, run_dir: Path | str, *, tensorboard: bool, wandb_project: str | None, config: Mapping[str, Any]) -> None:
        self._run_dir = Path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._path = self._run_dir / "metrics.jsonl"
        self._sinks: list[TensorBoardSink | WandbSink] = []
        if tensorboard:
            self._sinks.append(TensorBoardSink(self._run_dir / "logs" / "tensorboard"))
        if wandb_project is not None:
            self._sinks.append(WandbSink(self._run_dir, wandb_project, config))

    def write(self, row: Mapping[str, MetricValue]) -> None:
        """Append one step's row. It holds ``step``, and no name that ``METRICS`` lacks."""
        assert isinstance(row.get("step"), int), "a row of metrics needs its step"
        unknown = [name for name in row if not is_known(name)]
        assert not unknown, f"not in METRICS: {unknown}"
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_encode_row(row))
            file.flush()
            os.fsync(file.fileno())
        for sink in self._sinks:
            sink.write(row)

    def truncate_from(self, step: int) -> None:
        """Drop the rows of ``step`` and later, and a torn last line, from the file (atomically) and from TensorBoard."""
        kept = [row for row in read_metrics(self._run_dir) if row["step"] < step]  # type: ignore[operator]
        with atomic_file(self._path) as temporary:
            temporary.write_text("".join(map(_encode_row, kept)), encoding="utf-8")
        for sink in self._sinks:
            sink.truncate_from(step)

    def close(self) -> None:
        """Flush and close everything that was opened."""
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class PhaseTimer:
    """Seconds of a rollout step by phase. A phase inside another pauses it, so no second is counted twice.

    Phases are those of the calling thread. Verifying that runs behind generation costs nothing here: ``verify`` is what the
    step still waits for after the last answer came. The clock runs on between steps: what happens after :meth:`finish_step`
    counts for the next step.

    >>> ticks = iter([0.0, 1.0, 4.0, 5.0])
    >>> timer = PhaseTimer(clock=lambda: next(ticks))
    >>> with timer.phase("generate"):
    ...     pass
    >>> timings = timer.finish_step(generated_tokens=600, trained_tokens=0)
    >>> timings["time/generate"], timings["time/other"], timings["time/step"], timings["tokens_per_second/generate"]
    (3.0, 2.0, 5.0, 200.0)
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last = clock()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._open: list[str] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the ``with`` block as ``time/<name>``."""
        assert name in PHASES, f"{name!r} is not one of {PHASES}"
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        """Book the time since the last call to the innermost open phase."""
        now = self._clock()
        self._seconds[self._open[-1] if self._open else "other"] += now - self._last
        self._last = now

    def finish_step(self, *, generated_tokens: int, trained_tokens: int) -> dict[str, float]:
        """``time/…`` and ``tokens_per_second/…`` of the step that ends now; the next one begins.

        A rate is omitted where no tokens or no time went into its phase, as in a step resumed from its ledger.
        """
        assert not self._open, f"open phases at the end of a step: {self._open}"
        self._charge()
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        timings = {f"time/{name}": value for name, value in seconds.items()}
        timings["time/step"] = sum(seconds.values())
        for name, num_tokens in (("generate", generated_tokens), ("update", trained_tokens)):
            if num_tokens and seconds[name]:
                timings[f"tokens_per_second/{name}"] = num_tokens / seconds[name]
        return timings
