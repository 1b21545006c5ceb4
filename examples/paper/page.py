"""Writes the comparison's page from the metrics of its runs: the counterparts of Table 1 and of Figures 6, 8, 9 and 10."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from statistics_of_runs import accuracy_at, accuracy_by_samples, half_width, mean_and_deviation, smallest_visible
from variants import ALGORITHMS, EPSILON, OMEGA, folder_name

from nft_megatron.files import atomic_file
from nft_megatron.observe.metrics import read_metrics

Runs = dict[str, list[list[dict[str, Any]]]]
"""The rows of every run: variant, then seed. Variants that lack a seed are not in it."""

REFERENCE = "NFT"
ENTROPY_STEPS = 4  # the mean of so many steps at the start and at the end


def read_runs(root: Path, seeds: int, variants: Mapping[str, tuple[str, ...]]) -> Runs:
    """What is there of ``variants``."""
    found = {
        name: [read_metrics(root / f"seed{seed}" / folder_name(overrides)) for seed in range(seeds)]
        for name, overrides in variants.items()
    }
    return {name: rows for name, rows in found.items() if all(rows)}


def final_accuracies(runs: Runs, answers_per_question: int) -> tuple[int, dict[str, list[float]]]:
    """Samples that every run has had, and every run's held-out accuracy after so many."""
    points = {name: [accuracy_by_samples(rows, answers_per_question) for rows in each] for name, each in runs.items()}
    budget = min(one[-1][0] for each in points.values() for one in each)
    return budget, {name: [accuracy_at(one, budget) for one in each] for name, each in points.items()}


def table(accuracies: Mapping[str, list[float]], reference: str) -> list[str]:
    """Mean ± deviation over seeds, and the paired difference to ``reference`` with its 95 % interval, in points."""
    lines = [f"| | held-out accuracy | less {reference} | smallest difference that would show |", "|---|---|---|---|"]
    for name, values in accuracies.items():
        mean, deviation = mean_and_deviation(values)
        line = f"| {name} | {100 * mean:.1f} ± {100 * deviation:.1f} |"
        if name != reference and len(values) > 1:
            difference, spread = mean_and_deviation([a - b for a, b in zip(values, accuracies[reference], strict=True)])
            width, visible = half_width(spread, len(values)), smallest_visible(spread, len(values))
            line += f" {100 * difference:+.1f} ± {100 * width:.1f} | {100 * visible:.1f} |"
        else:
            line += " | |"
        lines.append(line)
    return lines


def entropies(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Of sampled answers, in the first and the last steps."""
    values = [row["entropy_sampled"] for row in rows if "entropy_sampled" in row]
    size = min(ENTROPY_STEPS, len(values))
    return math.fsum(values[:size]) / size, math.fsum(values[-size:]) / size


def write_page(root: Path, seeds: int, answers_per_question: int) -> Path:
    """Write ROOT/comparison.md and its picture; returns the page's path."""
    algorithms = read_runs(root, seeds, ALGORITHMS)
    budget, accuracies = final_accuracies(algorithms, answers_per_question)
    lines = ["# The paper's comparison at toy scale", "", f"{seeds} seeds, after {budget} sampled answers each, in points.", ""]
    lines += ["## Algorithms (Table 1, Figure 6)", "", *table(accuracies, REFERENCE), "", "![curves](comparison.png)", ""]
    lines += ["## Entropy of sampled answers (Figure 8)", "", "| | first steps | last steps |", "|---|---|---|"]
    for name, each in algorithms.items():
        first, last = zip(*map(entropies, each), strict=True)
        shown = [f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in map(mean_and_deviation, (first, last))]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    for title, variants, reference in (
        ("Prompt weight ω (Figure 9)", OMEGA, "ω = 1 − r̂"),
        ("Clamp ε (Figure 10)", EPSILON, "ε = 1"),
    ):
        runs = read_runs(root, seeds, variants)
        if len(runs) > 1:
            lines += ["", f"## {title}", "", *table(final_accuracies(runs, answers_per_question)[1], reference)]
    _draw(algorithms, answers_per_question, root / "comparison.png")
    with atomic_file(root / "comparison.md") as temporary:
        temporary.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return root / "comparison.md"


def _draw(runs: Runs, answers_per_question: int, path: Path) -> None:
    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, entropy = figure.subplots(1, 2)
    for number, (name, each) in enumerate(runs.items()):
        for seed, rows in enumerate(each):
            style = {"color": f"C{number}", "linewidth": 1, "label": name if seed == 0 else None}
            accuracy.plot(*zip(*accuracy_by_samples(rows, answers_per_question), strict=True), **style)
            sampled = [(row["step"], row["entropy_sampled"]) for row in rows if "entropy_sampled" in row]
            entropy.plot(*zip(*sampled, strict=True), **style)
    accuracy.set(title="Held-out accuracy", xlabel="sampled answers")
    entropy.set(title="Entropy of sampled answers (nats a token)", xlabel="rollout step")
    accuracy.legend(frameon=False, fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
