"""Curves of several runs each: the mean over seeds and, around it, one standard deviation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from statistics_of_runs import Points, mean_and_deviation, value_at

from nft_megatron.base.atomic_io import atomic_file

COLORS = ("#1d5fb0", "#a5a399", "#e0622c", "#1baf7a", "#4a3aa7", "#c9a227")
STYLE = {"svg.hashsalt": "comparison", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.5}
NUM_POINTS = 25


def draw_curves(panels: Sequence[tuple[str, Mapping[str, Sequence[Points]]]], budget: int, path: Path) -> None:
    """One panel per title, one colour per name, against sampled answers up to ``budget``; an SVG, complete or absent."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained", facecolor="#fdfdfc")
        counts = np.linspace(0, budget, NUM_POINTS)
        for axes, (title, curves) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            for color, (name, each) in zip(COLORS, curves.items(), strict=False):
                at = [mean_and_deviation([value_at(points, count) for points in each]) for count in counts]
                mean, deviation = np.array(at).T
                axes.plot(counts, mean, color=color, linewidth=1.6, label=name)
                axes.fill_between(counts, mean - deviation, mean + deviation, color=color, alpha=0.12, linewidth=0)
            axes.set_title(title, loc="left", fontweight="bold")
            axes.set_xlabel("sampled answers")
            axes.spines[:].set_visible(False)
            axes.grid(axis="y", color="#ebe9e2")
            axes.legend(frameon=False, fontsize=8.5)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
