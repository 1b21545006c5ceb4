"""One picture of a run, for a README or a slide: held-out accuracy, entropy, the distribution of r̂, time by phase, and below
them those of the algorithm's instruments that the run has: clamped and gradient shares by r̂, the gradients' cosine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.observe.metrics import RATE_BUCKETS
from nft_megatron.observe.summary import finite_points, held_out_points, load_rows

_INK, _INK_2, _GRID, _PAPER = "#14140f", "#55544c", "#ebe9e2", "#fdfdfc"
_BLUE, _AQUA, _VIOLET, _ORANGE, _GRAY = "#2a78d6", "#1baf7a", "#4a3aa7", "#e0622c", "#a5a399"

_BUCKETS = ("#b9d4f3", "#7fb0e8", _BLUE, "#1d5296", "#0f2f5c")  # from hard questions to easy ones

_MOST_MARKS = 40  # of points with a dot each, and of bars with a gap between them

_STACK = (
    ("generate", ("generate",), _BLUE),
    ("verify", ("verify",), _AQUA),
    ("old log-probs", ("prepare",), _VIOLET),
    ("update", ("update",), _ORANGE),
    ("everything else", ("publish", "ledger", "evaluate", "save", "other"), _GRAY),
)


def write_overview_png(run_dir: Path | str, out: Path | str) -> Path | None:
    """Draw the run's overview to ``out`` (PNG, 1800 × 1050 pixels, 1500 high with instruments), whole or not at all; returns
    ``out``, or None if the run has no metrics to draw yet.

    Raises:
        UserError: no such folder, or no run in it.
    """
    rows = load_rows(run_dir)
    if not rows:
        return None
    figure = overview(rows)
    with atomic_file(Path(out)) as temporary:
        figure.savefig(temporary, format="png")
    return Path(out)


def overview(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The picture of a run with these metrics, at least one row."""
    instruments = [
        draw
        for draw, name in (
            (_draw_clamp_rates, "clamp_rate/"),
            (_draw_gradient_shares, "gradient_share/"),
            (_draw_cosine, "gradient_cosine"),
        )
        if any(key.startswith(name) for row in rows for key in row)
    ]
    figure = Figure(
        figsize=(12, 10 if instruments else 7),
        dpi=150,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12),
        facecolor=_PAPER,
    )
    FigureCanvasAgg(figure)
    panels = (_draw_accuracy, _draw_entropy), (_draw_rates, _draw_seconds), instruments
    grid = figure.add_gridspec(3 if instruments else 2, 6)
    for row, drawn in enumerate(panels):
        for column, draw in enumerate(drawn):
            width = 6 // len(drawn)
            axes = figure.add_subplot(grid[row, column * width : (column + 1) * width])
            draw(axes, rows)
            axes.set_xlim(0, max(rows[-1]["step"] + 0.5, 1))
    return figure


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK)
    axes.set_facecolor(_PAPER)
    axes.spines[:].set_visible(False)
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9.5, labelcolor=_INK_2)
    axes.set_xlabel("rollout step", fontsize=9.5, color=_INK_2)


def _draw_accuracy(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    held_out, sampled = held_out_points(rows), finite_points(rows, "accuracy")
    change = f": {held_out[0][1]:.0%} → {held_out[-1][1]:.0%}" if held_out else ""
    _style(axes, f"Held-out accuracy{change}")
    if sampled:
        axes.plot(*zip(*sampled, strict=True), color=_ORANGE, linewidth=1.4, alpha=0.75, label="sampled answers")
    if held_out:
        size = 5 if len(held_out) <= _MOST_MARKS else 0
        x, y = zip(*held_out, strict=True)
        axes.plot(x, y, color=_BLUE, linewidth=2.2, label="held-out", marker="o", markersize=size, markeredgecolor=_PAPER)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _legend(axes, loc="lower right")


def _draw_entropy(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    _style(axes, "Entropy (nats per token)")
    points = finite_points(rows, "entropy")
    if points:
        axes.plot(*zip(*points, strict=True), color=_BLUE, linewidth=1.8)
        axes.set_ylim(0, 1.1 * max(entropy for _, entropy in points) or 1)


def _draw_rates(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """A column per step, a row per value k/K of r̂, coloured by the share of the step's questions."""
    _style(axes, "Questions by r̂, the share of right answers")
    axes.grid(visible=False)
    histograms = [(row["step"], row["correct_rate_histogram"]) for row in rows if sum(row.get("correct_rate_histogram", []))]
    if not histograms:
        return
    steps, counts = zip(*histograms, strict=True)
    shares = np.array([np.array(bins) / sum(bins) for bins in counts])  # [step, K + 1]
    half_bin = 0.5 / max(shares.shape[1] - 1, 1)
    colors = LinearSegmentedColormap.from_list("paper to blue", [_PAPER, "#9cc3ef", _BLUE, "#123f78"])
    for step, column in zip(steps, shares, strict=True):
        extent = (step - 0.5, step + 0.5, -half_bin, 1 + half_bin)
        axes.imshow(
            column[:, None],
            origin="lower",
            aspect="auto",
            extent=extent,
            cmap=colors,
            vmin=0,
            vmax=shares.max(),
            interpolation="nearest",
        )
    axes.set_ylim(-half_bin, 1 + half_bin)


def _draw_seconds(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    _style(axes, "Seconds per rollout step")
    steps = [row["step"] for row in rows]
    width = 0.86 if len(rows) <= _MOST_MARKS else 1.0
    base = np.zeros(len(rows))
    for label, phases, color in _STACK:
        height = np.array([sum(row.get(f"time/{phase}", 0.0) for phase in phases) for row in rows])
        axes.bar(steps, height, width=width, bottom=base, color=color, label=label)
        base += height
    axes.set_ylim(0, 1.22 * max(base, default=0) or 1)
    _legend(axes, loc="upper center", ncols=len(_STACK))


def _draw_clamp_rates(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    _style(axes, "Clamped tokens of wrong answers, by r̂")
    for bucket, color in zip(RATE_BUCKETS, _BUCKETS, strict=True):
        if points := finite_points(rows, f"clamp_rate/{bucket}"):
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.4, label=bucket)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _legend(axes, loc="upper center", ncols=3)


def _draw_gradient_shares(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The share of each r̂, stacked; a bucket without tokens has none."""
    _style(axes, "Share of the gradient, by r̂")
    steps = [row["step"] for row in rows]
    shares = [[row.get(f"gradient_share/{bucket}", 0.0) for row in rows] for bucket in RATE_BUCKETS]
    axes.stackplot(steps, shares, labels=RATE_BUCKETS, colors=_BUCKETS)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _draw_cosine(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    _style(axes, "Cosine of right and wrong gradients")
    axes.axhline(0, color=_INK_2, linewidth=0.8)
    if points := finite_points(rows, "gradient_cosine"):
        axes.plot(*zip(*points, strict=True), color=_BLUE, linewidth=1.4, marker="o", markersize=4)
    axes.set_ylim(-1, 1)


def _legend(axes: Axes, **where: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            frameon=False, fontsize=9.5, labelcolor=_INK_2, handlelength=1.0, handletextpad=0.5, columnspacing=1.2, **where
        )
