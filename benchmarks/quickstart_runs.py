"""Runs of the quickstart for benchmarks: a cold start per seed, then ``nft-megatron train`` on it with overrides."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nft_megatron.observe.metrics import MetricsRow, read_metrics

QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart"


def prepare_start(folder: Path, seed: int) -> Path:
    """The model that a run of this seed starts from and its questions, in ``folder``."""
    start = folder / "start"
    _run(sys.executable, QUICKSTART / "prepare.py", "--out", start, "--seed", seed)
    return start


def train_from(start: Path, run_dir: Path, seed: int, overrides: Sequence[str]) -> list[MetricsRow]:
    """The metrics of a run, one row per step."""
    _run(
        Path(sys.executable).parent / "nft-megatron",
        "train",
        QUICKSTART / "config.yaml",
        f"seed={seed}",
        f"run_dir={run_dir}",
        f"model.path={start / 'model'}",
        f"data.train={start / 'train.parquet'}",
        f"evaluate.data={start / 'held_out.parquet'}",
        *overrides,
    )
    return read_metrics(run_dir)


def _run(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout[-3000:]}")
