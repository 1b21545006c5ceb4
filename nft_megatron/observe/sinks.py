"""Where metrics rows go besides the file: TensorBoard and Weights & Biases.

Both take rows through ``write``, forget what a killed process wrote beyond a step through ``truncate_from``, and ``close``.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.errors import UserError


class TensorBoardSink:
    """Scalars under their own names; the r̂ histogram as a histogram over [0, 1]."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._purge_step: int | None = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Log one row at its ``step``."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # imports TensorBoard, half a second

            # purge_step makes readers forget what an earlier, killed process logged from that step on.
            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        step = row["step"]
        for name, value in row.items():
            if isinstance(value, list):
                self._write_histogram(name, value, step)
            elif name != "step":
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def _write_histogram(self, name: str, counts: Sequence[int], step: int) -> None:
        """Bin k of K+1 holds the groups with r̂ = k/K; its upper edge lies halfway to the next value."""
        num_bins = len(counts)
        rates = [k / max(num_bins - 1, 1) for k in range(num_bins)]
        self._writer.add_histogram_raw(
            name,
            min=0.0,
            max=1.0,
            num=sum(counts),
            sum=sum(rate * count for rate, count in zip(rates, counts, strict=True)),
            sum_squares=sum(rate**2 * count for rate, count in zip(rates, counts, strict=True)),
            bucket_limits=[rate + 0.5 / max(num_bins - 1, 1) for rate in rates],
            bucket_counts=list(counts),
            global_step=step,
        )

    def truncate_from(self, step: int) -> None:
        self.close()
        self._purge_step = step

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbSink:
    """One Weights & Biases run for one run folder: its id is kept in RUN/logs/wandb_id, so a resumed run continues in it."""

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            problem, remedy = (
                "the package wandb is not installed",
                "run `pip install 'nft_megatron[wandb]'`, or unset it",
            )
            raise UserError("observe.wandb_project", project, problem, remedy) from error
        id_file = run_dir / "logs" / "wandb_id"
        if not id_file.exists():
            with atomic_file(id_file) as temporary:
                temporary.write_text(uuid.uuid4().hex[:12])
        self._histogram = wandb.Histogram
        self._run = wandb.init(
            project=project,
            name=run_dir.resolve().name,
            id=id_file.read_text(),
            resume="allow",
            dir=str(run_dir / "logs"),
            config=dict(config),
        )
        # wandb drops what is logged at a lower step than before, which a resumed run does; an axis of our own has no such rule.
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Mapping[str, Any]) -> None:
        """Log one row at its ``step``."""
        self._run.log({name: self._histogram_of(value) if isinstance(value, list) else value for name, value in row.items()})

    def _histogram_of(self, counts: Sequence[int]) -> Any:
        width = 1 / max(len(counts) - 1, 1)
        return self._histogram(np_histogram=(list(counts), [(k - 0.5) * width for k in range(len(counts) + 1)]))

    def truncate_from(self, step: int) -> None:
        """Nothing to take back: the rows are logged again at the same ``step``."""

    def close(self) -> None:
        self._run.finish()
