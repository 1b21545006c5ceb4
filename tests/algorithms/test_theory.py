"""The curves of docs/theory.md are the formulas printed there, and the pictures are drawn from them."""

import importlib.util
from pathlib import Path

import pytest
import torch

from nft_megatron.algorithms import build_algorithm

DOCS = Path(__file__).resolve().parents[2] / "docs"
SPEC = importlib.util.spec_from_file_location("draw_theory", DOCS / "draw_theory.py")
draw_theory = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(draw_theory)

RATIO_N = torch.tensor([0.1, 0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("rate", draw_theory.RATES)
def test_token_weights(rate):
    odds = rate / (1 - rate)
    x_N = (1 - rate * RATIO_N) / (1 - rate)
    rising_N, falling_N = (RATIO_N < 1.28).double(), (RATIO_N > 0.8).double()
    expected = {
        "rft": ({}, 1 / RATIO_N, None),
        "nft": ({"epsilon": 0.1}, (1 - rate) / RATIO_N, -(1 - rate) * odds / x_N.clamp(min=0.1)),
        "grpo": ({}, rising_N * odds**-0.5, -falling_N * odds**0.5),
        "dr_grpo": ({}, rising_N * (1 - rate), -falling_N * rate),
        "dapo": ({}, rising_N * odds**-0.5, -falling_N * odds**0.5),
    }
    for name, (options, right_N, wrong_N) in expected.items():
        algorithm = build_algorithm(name, **options)
        torch.testing.assert_close(draw_theory.token_weight(algorithm, RATIO_N, rate, True), right_N, rtol=1e-12, atol=1e-15)
        if wrong_N is not None:
            torch.testing.assert_close(
                draw_theory.token_weight(algorithm, RATIO_N, rate, False), wrong_N, rtol=1e-12, atol=1e-15
            )


@pytest.mark.parametrize("rate", draw_theory.RATES)
def test_answer_weights(rate):
    s_N = torch.tensor([-30.0, 0.0, 5.0, 40.0], dtype=torch.float64)
    softmax_N = (0.1 * s_N).exp() / ((0.1 * s_N).exp() + 15)
    for is_correct, target in ((True, 1 / (16 * rate)), (False, 0.0)):
        measured = draw_theory.answer_weight(build_algorithm("infonca", sft_weight=0.3), s_N, rate, is_correct)
        torch.testing.assert_close(measured, 0.1 * (target - softmax_N) + 0.3 * target, rtol=1e-12, atol=1e-15)


def test_pictures_are_drawn_whole(tmp_path):
    draw_theory.main(tmp_path)
    for name in ("gradient_weights.svg", "gradient_weights_infonca.svg"):
        drawn, committed = (tmp_path / name).read_text(), (DOCS / name).read_text()
        assert drawn.startswith("<?xml") and drawn.rstrip().endswith("</svg>")
        assert drawn.count("r̂ = 14/16") == committed.count("r̂ = 14/16") >= 1
