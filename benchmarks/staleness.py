"""What collecting ahead gives and takes: the quickstart with rollout.max_staleness 0 and 1 from the same starts.

For each of --seeds a cold start of the quickstart's model, then one run after the other with the seed, nothing beside them.

  waiting     share of the trainer's time that it waits for answers and verdicts, over all steps
  steps       all steps together, evaluations included
  accuracy    held-out, greedy, after the last step

Below, the differences in pairs: mean ± two standard errors. Goal: accuracy differs by less than that.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from pathlib import Path

import numpy as np
from quickstart_runs import prepare_start, train_from

STALENESS = (0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6, help="(%(default)s)")
    parser.add_argument("overrides", nargs="*", help="of every run, such as train.num_steps=48")
    options = parser.parse_args()
    extra = "".join(f" {override}" for override in options.overrides)
    print(f"# python benchmarks/staleness.py --seeds {options.seeds}{extra} · {os.cpu_count()} cores, {platform.machine()}")
    print("| seed | staleness | waiting | steps s | accuracy |")
    print("|-----:|----------:|--------:|--------:|---------:|")
    measured = np.array([measure_pair(seed, options.overrides) for seed in range(options.seeds)])
    differences = measured[:, 1] - measured[:, 0]
    error = 2 * differences.std(axis=0, ddof=1) / np.sqrt(len(differences)) if len(differences) > 1 else np.full(3, np.nan)
    waiting, seconds, accuracy = (f"{mean:+.1f} ± {two:.1f}" for mean, two in zip(differences.mean(axis=0), error, strict=True))
    print(f"\nstaleness 1 - 0: waiting {waiting} points, steps {seconds} s, accuracy {accuracy} points")


def measure_pair(seed: int, overrides: list[str]) -> list[tuple[float, float, float]]:
    """Of each staleness: waiting in percent, seconds, accuracy in percent."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        start = prepare_start(Path(folder), seed)
        for staleness in STALENESS:
            choice = f"rollout.max_staleness={staleness}"
            steps = train_from(start, Path(folder) / f"run{staleness}", seed, [choice, *overrides])
            seconds = sum(row["time/step"] for row in steps)
            waiting = 100 * sum(row["time/generate"] + row["time/verify"] for row in steps) / seconds
            accuracy = 100 * next(row["eval_accuracy"] for row in reversed(steps) if "eval_accuracy" in row)
            print(f"| {seed:4} | {staleness:9} | {waiting:6.1f}% | {seconds:7.1f} | {accuracy:7.2f}% |", flush=True)
            rows.append((waiting, seconds, accuracy))
    return rows


if __name__ == "__main__":
    main()
