"""Whether answers or whole questions are dealt out over the mini-batches: the quickstart under both, from the same starts.

    python benchmarks/minibatch_of.py [--seeds 6] [--algorithms nft rft dapo] [--overrides train.updates_per_step=16]

Every run appends one line to results/minibatch_of.jsonl as it ends, and a run that has its line is not repeated. The table
holds differences, answers less questions, in pairs with the same start, order of questions and samples: mean ± standard
error over the seeds. Training accuracy is that of the answers sampled in a window of steps; held-out accuracy is sampled at
temperature 1 after the last step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from quickstart_runs import prepare_start, train_from

RESULTS = Path(__file__).resolve().parent / "results" / "minibatch_of.jsonl"
CHOICES = ("questions", "answers")
WINDOW = 4
SAMPLED = ("evaluate.temperature=1", "evaluate.samples=4", "evaluate.every=100")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6, help="(%(default)s)")
    parser.add_argument("--algorithms", nargs="+", default=["nft", "rft", "dapo"], help="(all three)")
    parser.add_argument("--overrides", nargs="+", default=[], help="of every run, such as train.updates_per_step=16")
    options = parser.parse_args()
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for seed in range(options.seeds):
        wanted = [
            {"algorithm": algorithm, "seed": seed, "minibatch_of": choice, "overrides": options.overrides}
            for algorithm in options.algorithms
            for choice in CHOICES
        ]
        missing = [run for run in wanted if not any(run.items() <= row.items() for row in rows)]
        if missing:
            with tempfile.TemporaryDirectory() as folder:
                start = prepare_start(Path(folder), seed)
                for number, run in enumerate(missing):
                    rows.append(run | measure(start, Path(folder) / f"run{number}", run))
                    with RESULTS.open("a") as results:
                        results.write(json.dumps(rows[-1]) + "\n")
    for algorithm in options.algorithms:
        chosen = [row for row in rows if row["algorithm"] == algorithm and row["overrides"] == options.overrides]
        print(table(algorithm, chosen))


def measure(start: Path, run_dir: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Percent by step, percent, and the mean gradient norm by step."""
    overrides = [f"algorithm.name={run['algorithm']}", f"train.minibatch_of={run['minibatch_of']}", *run["overrides"]]
    steps = train_from(start, run_dir, run["seed"], [*SAMPLED, *overrides])
    return {
        "accuracy": [round(100 * row["accuracy"], 3) for row in steps],
        "grad_norm": [round(row["grad_norm"], 5) for row in steps],
        "held_out": round(100 * next(row["eval_accuracy"] for row in reversed(steps) if "eval_accuracy" in row), 3),
    }


def table(algorithm: str, rows: list[dict[str, Any]]) -> str:
    """The paired differences of one algorithm, as Markdown."""
    by_choice = [{row["seed"]: row for row in rows if row["minibatch_of"] == choice} for choice in CHOICES]
    seeds = sorted(by_choice[0].keys() & by_choice[1].keys())
    questions, answers = (
        {key: np.array([rows[seed][key] for seed in seeds]) for key in ("accuracy", "grad_norm", "held_out")}
        for rows in by_choice
    )
    lines = [f"\n{algorithm}, {len(seeds)} seeds", "| | questions | answers | difference |", "|---|--:|--:|--:|"]
    num_steps = questions["accuracy"].shape[1]
    for first in range(0, num_steps, WINDOW):
        window = slice(first, first + WINDOW)
        pair = [each["accuracy"][:, window].mean(axis=1) for each in (questions, answers)]
        lines.append(line(f"training accuracy, steps {first + 1}-{min(first + WINDOW, num_steps)}", *pair))
    lines.append(line("held-out accuracy, sampled", questions["held_out"], answers["held_out"]))
    lines.append(line("gradient norm", *(each["grad_norm"].mean(axis=1) for each in (questions, answers))))
    return "\n".join(lines)


def line(name: str, before: np.ndarray, after: np.ndarray) -> str:
    difference = after - before
    error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else np.nan
    return f"| {name} | {before.mean():.2f} | {after.mean():.2f} | {difference.mean():+.2f} ± {error:.2f} |"


if __name__ == "__main__":
    main()
