"""Megatron's optimizer as we set it up, against torch's AdamW in float64, fed with the same made-up gradients."""

from pathlib import Path

import pytest
import torch
from optimizer_worker import NUM_UPDATES, PROBLEMS, measure
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from nft_megatron.config.sections import OptimizerConfig


@pytest.fixture(scope="module")
def measured(world, model_folder: Path) -> dict:
    return world(1)(measure, model_folder)


def test_warm_up_starts_above_zero_and_ends_at_the_full_rate():
    settings = OptimizerConfig(learning_rate=1e-6, warmup_updates=10)
    rates = [settings.learning_rate_at(update) for update in (1, 5, 10, 11, 1000)]
    assert rates == pytest.approx([1e-7, 5e-7, 1e-6, 1e-6, 1e-6], rel=1e-12)
    assert OptimizerConfig(learning_rate=1e-6, warmup_updates=0).learning_rate_at(1) == 1e-6


def test_warm_up_in_stairs_is_one_that_steps_once_per_rollout_step():
    """The authors' scheduler: 10 steps of warm-up from 0, taken after each rollout step of 16 updates."""
    settings = OptimizerConfig(learning_rate=1e-6, warmup_updates=160, warmup_stair=16)
    rates = [settings.learning_rate_at(update) for update in range(1, 193)]
    assert rates == pytest.approx([1e-6 * min(1, step / 10) for step in range(12) for _ in range(16)], rel=1e-12)
    assert OptimizerConfig(learning_rate=1e-6, warmup_updates=0, warmup_stair=16).learning_rate_at(1) == 1e-6


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("min_rate", [0.0, 0.1])
def test_a_falling_rate_is_torchs(schedule, warmup, min_rate):
    """LinearLR and CosineAnnealingLR from the end of the warm-up to ``decay_updates``; then the smallest rate for good."""
    last, lr = 50, 1e-3
    settings = OptimizerConfig(
        learning_rate=lr, warmup_updates=warmup, schedule=schedule, decay_updates=last, min_rate=min_rate
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr)
    scheduler = (
        LinearLR(optimizer, 1.0, min_rate, last - warmup)
        if schedule == "linear"
        else CosineAnnealingLR(optimizer, last - warmup, lr * min_rate)
    )
    for update in range(warmup, last + 1):
        expected = optimizer.param_groups[0]["lr"]
        if update:
            assert settings.learning_rate_at(update) == pytest.approx(expected, rel=1e-9, abs=1e-15)
        optimizer.step()
        scheduler.step()
    assert settings.learning_rate_at(10 * last) == pytest.approx(lr * min_rate, abs=1e-18)
    assert [settings.learning_rate_at(update) for update in range(1, warmup)] == pytest.approx(
        [lr * update / warmup for update in range(1, warmup)]
    )


def test_updates_are_those_of_adamw_in_float64(measured: dict):
    assert measured["learning_rates"] == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3, 3e-3])
    assert measured["grad_norms"] == pytest.approx(measured["expected_norms"], rel=1e-5)
    assert measured["grad_norms"][0] > 1 > measured["grad_norms"][1], "both sides of the clip are exercised"
    assert max(measured["errors"].values()) < 2e-6, measured["errors"]


def test_weights_without_decay_are_biases_and_norms(measured: dict):
    assert all(("bias" in name or "norm" in name) for name in measured["without_decay"])
    assert len(measured["without_decay"]) == 3 * 2 + 1  # QKV bias and two norms a layer, and the final norm


def test_all_weights_decay_if_asked(measured: dict):
    """Without a gradient an update is the decay alone: θ · (1 − 1e-3 · 0.1)."""
    decayed = measured["decay_all"]
    assert len(decayed) == len(measured["errors"]) and max(decayed.values()) < 1e-7
    assert set(measured["without_decay"]) <= decayed.keys()


@pytest.mark.parametrize("bad", PROBLEMS)
def test_a_gradient_that_is_not_finite_changes_nothing(measured: dict, bad: str):
    assert measured[bad] == {"problem": PROBLEMS[bad], "changed": [], "num_updates": NUM_UPDATES}


def test_small_updates_of_bfloat16_weights_add_up_in_the_master_copy(measured: dict):
    """Under a constant gradient each Adam update is the learning rate: 1e-4, a fortieth of bfloat16's step of 2^-8 below 1."""
    assert measured["bfloat16_first"] == 1.0
    assert measured["bfloat16_last"] == pytest.approx(1 - 100 * 1e-4, abs=2**-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_that_waits_on_the_host_changes_no_bit(measured: dict, dtype: str):
    """Half of the state, by size; float32 models have no master copy of their weights to move."""
    offloaded = measured[f"offloaded {dtype}"]
    assert offloaded["differs"] == []
    largest, total = offloaded["largest_parameter"], offloaded["num_parameters"]
    bytes_of = 12 if dtype == "bfloat16" else 8
    assert bytes_of * (total / 2 - largest) < offloaded["host_bytes"] <= bytes_of * total / 2
    assert offloaded["parked"] == offloaded["host_bytes"], "between updates the optimizer's tensors are the host's"
