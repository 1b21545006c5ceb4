"""Writes the comparison's page from the metrics of its runs: the counterparts of Table 1 and of Figures 6, 8, 9 and 10."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import draw_curves
from statistics_of_runs import (
    LATE,
    Points,
    accuracy_by_samples,
    entropy_by_samples,
    half_width,
    late_mean,
    mean_and_deviation,
    smallest_visible,
    verdict,
)
from variants import ALGORITHMS, EPSILON, FINDINGS, OMEGA, WEIGHT, Finding, folder_name

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.observe.metrics import read_metrics

MARGIN = 0.03
"""Difference in held-out accuracy below which runs count as about equal."""
HOW_TO_READ = (
    "{seeds} seeds; a seed is a cold start, an order of questions and a stream of samples, shared by all variants. Every run "
    "is judged by the mean of its curve over the last quarter of {budget:,} sampled answers ({readings} readings), as many as "
    "each of them has. ± after a mean is the standard deviation over seeds; ± after a difference is half of its 95 % interval, "
    "from differences between runs of one seed (paired t, not corrected for their number). “At least” and “about” allow "
    "{margin:.0f} points."
)
ABLATIONS = {
    "Prompt weight ω (Figure 9)": OMEGA,
    "Clamp ε (Figure 10)": EPSILON,
    "Weight of wrong answers": WEIGHT,
}


@dataclass(frozen=True)
class Runs:
    """The curves of every finished variant, by name, then by seed. ``budget``: answers that every run has sampled."""

    seeds: int
    accuracy: Mapping[str, list[Points]]
    entropy: Mapping[str, list[Points]]
    budget: int
    number: int
    hours: float

    def judged(self, quantity: str, name: str) -> list[float]:
        """Mean over the late readings of each seed's run."""
        return [late_mean(points, self.budget) for points in getattr(self, quantity)[name]]

    def start(self, quantity: str, name: str) -> list[float]:
        """Before training."""
        return [points[0][1] for points in getattr(self, quantity)[name]]


def read_runs(root: Path, seeds: int, group_size: int) -> Runs:
    """The variants that have finished with all ``seeds``."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    seconds: dict[Path, float] = {}
    for name, overrides in (ALGORITHMS | OMEGA | EPSILON | WEIGHT).items():
        folders = [root / f"seed{seed}" / folder_name(overrides) for seed in range(seeds)]
        if all((folder / "hf").is_dir() for folder in folders):
            found[name] = [read_metrics(folder) for folder in folders]
            seconds |= {
                folder: sum(row["time/step"] for row in rows) for folder, rows in zip(folders, found[name], strict=True)
            }
    accuracy = {name: [accuracy_by_samples(rows, group_size) for rows in each] for name, each in found.items()}
    entropy = {name: [entropy_by_samples(rows, group_size) for rows in each] for name, each in found.items()}
    budget = min(one[-1][0] for each in accuracy.values() for one in each)
    return Runs(seeds, accuracy, entropy, budget, len(seconds), sum(seconds.values()) / 3600)


def write_page(root: Path, seeds: int, group_size: int, command: str, settings: str) -> Path:
    """Write ROOT/comparison.md and its two pictures; returns the page's path. Raises an error without a finished variant."""
    runs = read_runs(root, seeds, group_size)
    lines = [
        "# The paper's comparison at toy scale",
        "",
        f"Written by `{command}`; {settings}. {_machine()}; the steps of all {runs.number} runs took {runs.hours:.1f} "
        "hours together.",
        "",
        HOW_TO_READ.format(seeds=seeds, budget=runs.budget, readings=len(LATE), margin=100 * MARGIN),
        "",
        "## Findings",
        "",
        "| the paper | here | seen? |",
        "|---|---|---|",
        *(
            _finding(runs, finding)
            for finding in FINDINGS
            if {finding.left, finding.right or finding.left} <= set(runs.accuracy)
        ),
        "",
        "## Algorithms (Table 1, Figures 6 and 8)",
        "",
        *_table(runs, ALGORITHMS, "NFT"),
        "",
        "![Held-out accuracy and entropy of the six algorithms](comparison_algorithms.svg)",
    ]
    draw_curves(
        [
            ("Held-out accuracy", {name: runs.accuracy[name] for name in ALGORITHMS if name in runs.accuracy}),
            (
                "Entropy of sampled answers, nats a token",
                {name: runs.entropy[name] for name in ALGORITHMS if name in runs.entropy},
            ),
        ],
        runs.budget,
        root / "comparison_algorithms.svg",
    )
    panels = []
    for title, variants in ABLATIONS.items():
        present = [name for name in variants if name in runs.accuracy]
        if len(present) > 1:
            lines += ["", f"## {title}", "", *_table(runs, variants, present[0])]
            panels.append((title, {name: runs.accuracy[name] for name in present}))
    if panels:
        lines += ["", "![Held-out accuracy of NFT under other ω, ε and weights of wrong answers](comparison_ablations.svg)"]
        draw_curves(panels, runs.budget, root / "comparison_ablations.svg")
    with atomic_file(root / "comparison.md") as temporary:
        temporary.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return root / "comparison.md"


def _table(runs: Runs, variants: Mapping[str, object], reference: str) -> list[str]:
    """Mean ± deviation over seeds, and the paired difference to ``reference`` with its 95 % interval, in points."""
    lines = [
        f"| | accuracy before | accuracy | less {reference} | smallest difference that would show | entropy before | entropy |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in variants:
        if name not in runs.accuracy:
            continue
        values, difference = runs.judged("accuracy", name), " | "
        if name != reference and runs.seeds > 1:
            mean, spread = mean_and_deviation(_less(values, runs.judged("accuracy", reference)))
            width, visible = half_width(spread, runs.seeds), smallest_visible(spread, runs.seeds)
            difference = f"{100 * mean:+.1f} ± {100 * width:.1f} | {100 * visible:.1f}"
        cells = [
            name,
            _with_deviation(runs.start("accuracy", name), 100, 1),
            _with_deviation(values, 100, 1),
            difference,
            _with_deviation(runs.start("entropy", name), 1, 3),
            _with_deviation(runs.judged("entropy", name), 1, 3),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _finding(runs: Runs, finding: Finding) -> str:
    """Its row of the table: the claim, the difference here, whether it is seen."""
    values = runs.judged(finding.quantity, finding.left)
    other = runs.judged(finding.quantity, finding.right) if finding.right else runs.start(finding.quantity, finding.left)
    mean, deviation = mean_and_deviation(_less(values, other))
    width = half_width(deviation, runs.seeds)
    in_points = finding.quantity == "accuracy"
    shown = f"{100 * mean:+.1f} ± {100 * width:.1f} points" if in_points else f"{mean:+.4f} ± {width:.4f} nats"
    what = f"{finding.left} less {finding.right}" if finding.right else f"{finding.left}, change"
    return f"| {finding.claim} | {what}: {shown} | {verdict(finding.kind, mean, width, MARGIN)} |"


def _less(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(values, others, strict=True)]


def _with_deviation(values: Sequence[float], scale: float, digits: int) -> str:
    mean, deviation = mean_and_deviation(values)
    return f"{scale * mean:.{digits}f} ± {scale * deviation:.{digits}f}"


def _machine() -> str:
    """Processor and cores of this machine."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores, {names[0].partition(':')[2].strip() if names else 'unknown processor'}"
