"""Draws the pictures of docs/theory.md from the functions that train:  python docs/draw_theory.py [FOLDER]"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from nft_megatron.algorithms import Algorithm, AnswerBatch, TokenBatch, build_algorithm
from nft_megatron.base.atomic_io import atomic_file

NUM_ANSWERS = 16
RATES = (1 / 8, 1 / 2, 7 / 8)
TOKEN_CURVES: dict[str, tuple[Algorithm, dict[str, Any]]] = {
    "RFT": (build_algorithm("rft"), {"color": "#a5a399"}),
    "GRPO, DAPO": (build_algorithm("grpo"), {"color": "#f0a98f", "linewidth": 4.5}),
    "NFT, ω = √((1 − r̂)/r̂)": (build_algorithm("nft", prompt_weight="sqrt_odds"), {"color": "#c03d10"}),
    "… with ε = 0.1": (
        build_algorithm("nft", prompt_weight="sqrt_odds", epsilon=0.1),
        {"color": "#c03d10", "linestyle": (0, (2, 2))},
    ),
    "Dr. GRPO": (build_algorithm("dr_grpo"), {"color": "#a8c8ef", "linewidth": 4.5}),
    "NFT, ω = 1 − r̂": (build_algorithm("nft"), {"color": "#1d5fb0"}),
}
STYLE = {"svg.hashsalt": "theory", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.5}
INK, GRID, PAPER = "#14140f", "#ebe9e2", "#fdfdfc"


def question(rate: float, dtype: torch.dtype = torch.float64) -> AnswerBatch:
    """K answers, the first r̂·K of them right; none is long."""
    is_correct_A = torch.arange(NUM_ANSWERS) < round(rate * NUM_ANSWERS)
    rate_A = torch.full((NUM_ANSWERS,), rate, dtype=dtype)
    return AnswerBatch(
        torch.zeros(NUM_ANSWERS).long(), is_correct_A, rate_A, torch.ones(NUM_ANSWERS), is_correct_A & False, 100
    )


def token_weight(algorithm: Algorithm, ratio_N: Tensor, rate: float, is_correct: bool) -> Tensor:
    """−ω·dℓ/dR at R = ``ratio_N``: the factor on ∇R in a step against the gradient, as in Proposition 4.1."""
    answers, answer = question(rate), 0 if is_correct else -1
    advantage_A = algorithm.advantage(answers)
    logprob_N, ones_N = ratio_N.log().requires_grad_(), torch.ones_like(ratio_N)
    batch = TokenBatch(
        logprob_N,
        0 * ones_N,
        ones_N > (0 if is_correct else 1),
        rate * ones_N,
        None if advantage_A is None else advantage_A[answer] * ones_N,
    )
    (gradient_N,) = torch.autograd.grad(algorithm.token_loss(batch).loss_N.sum(), logprob_N)
    return -algorithm.weight(answers)[answer] * gradient_N / ratio_N


def answer_weight(algorithm: Algorithm, log_ratio_N: Tensor, rate: float, is_correct: bool) -> Tensor:
    """−ω·dℓ/dS of one answer at S = ``log_ratio_N``, all other answers to the question being at S = 0."""
    answers, answer, weights = question(rate), 0 if is_correct else -1, []
    for log_ratio in log_ratio_N:
        log_ratio_A = torch.zeros(NUM_ANSWERS, dtype=torch.float64)
        log_ratio_A[answer] = log_ratio
        log_ratio_A.requires_grad_()
        weights.append(-torch.autograd.grad(algorithm.sequence_loss(answers, log_ratio_A).sum(), log_ratio_A)[0][answer])
    return torch.stack(weights)


def draw_tokens() -> Figure:
    """Weights of token losses against R: right answers above, wrong ones below, one column per r̂."""
    figure = Figure(figsize=(10.5, 6.4), layout="constrained", facecolor=PAPER)
    ratio_N = torch.linspace(0.02, 2.5, 497, dtype=torch.float64)
    rows = figure.subplots(2, len(RATES), sharex=True, sharey="row")
    for axes, is_correct in zip(rows, (True, False), strict=True):
        for axis, rate in zip(axes, RATES, strict=True):
            _style(axis, f"{'right' if is_correct else 'wrong'} answers, r̂ = {round(rate * NUM_ANSWERS)}/{NUM_ANSWERS}")
            axis.axvline(1, color=INK, linewidth=0.6)
            for label, (algorithm, style) in TOKEN_CURVES.items():
                if is_correct or algorithm.uses_wrong_answers:
                    weight_N = token_weight(algorithm, ratio_N, rate, is_correct)
                    axis.plot(ratio_N, weight_N, label=label, **{"linewidth": 1.5, **style})
        axes[0].set_ylabel("weight of ∇R")
    rows[0][0].set_ylim(0, 4)
    rows[1][0].set_ylim(-4, 0)
    for axis in rows[1]:
        axis.set_xlabel("R = π⁺(a_t) / π(a_t)")
    rows[0][2].legend(frameon=False, fontsize=8.5)
    return figure


def draw_answers() -> Figure:
    """Weights of InfoNCA against the log-ratio of one answer."""
    figure = Figure(figsize=(10.5, 3.2), layout="constrained", facecolor=PAPER)
    log_ratio_N = torch.linspace(-60, 60, 241, dtype=torch.float64)
    axes = figure.subplots(1, len(RATES), sharey=True)
    infonca = build_algorithm("infonca", sft_weight=0.0)
    for axis, rate in zip(axes, RATES, strict=True):
        _style(axis, f"InfoNCA, β = 0.1, r̂ = {round(rate * NUM_ANSWERS)}/{NUM_ANSWERS}")
        for is_correct, color in ((True, "#1baf7a"), (False, "#e0622c")):
            weight_N = answer_weight(infonca, log_ratio_N, rate, is_correct)
            axis.plot(log_ratio_N, weight_N, color=color, linewidth=1.5, label="right answer" if is_correct else "wrong answer")
        axis.set_xlabel("S = Σ log R of the answer")
    axes[0].set_ylabel("weight of ∇ log π of each token")
    axes[0].legend(frameon=False, fontsize=8.5)
    return figure


def _style(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axis.set_facecolor(PAPER)
    axis.spines[:].set_visible(False)
    axis.grid(color=GRID)
    axis.tick_params(length=0)


def main(folder: Path) -> None:
    """Write both pictures into ``folder``; the same bytes every time for one version of matplotlib."""
    with mpl.rc_context(STYLE):
        for name, draw in (("gradient_weights.svg", draw_tokens), ("gradient_weights_infonca.svg", draw_answers)):
            with atomic_file(folder / name) as temporary:
                draw().savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
            print(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
