"""What GRPO, Dr. GRPO and DAPO promise beyond their equations: clipping, identities, extreme ratios."""

import math

import pytest
import torch

from nft_megatron.algorithms import AnswerBatch, TokenBatch, build_algorithm
from nft_megatron.algorithms.policy_gradient import clipped_coefficient, group_advantage

FLOAT64 = torch.float64


def tokens(delta, advantage, dtype=FLOAT64):
    delta_N = torch.tensor(delta, dtype=dtype)
    ones_N = torch.ones_like(delta_N)
    return TokenBatch(delta_N.requires_grad_(), 0 * ones_N, ones_N > 0, 0.5 * ones_N, torch.tensor(advantage, dtype=dtype))


@pytest.mark.parametrize("num_correct", [1, 5, 8, 15])
def test_advantages_are_those_of_proposition_4_1(num_correct):
    """Population standard deviation: sqrt((1 − r̂)/r̂) and −sqrt(r̂/(1 − r̂)); Dr. GRPO: 1 − r̂ and −r̂."""
    reward_A = torch.tensor([1.0] * num_correct + [0.0] * (16 - num_correct), dtype=FLOAT64)
    rate = num_correct / 16
    answers = AnswerBatch(torch.zeros(16).long(), reward_A > 0, torch.full((16,), rate, dtype=FLOAT64), *[reward_A] * 2, 9)
    for name, right, wrong in (
        ("grpo", math.sqrt((1 - rate) / rate), -math.sqrt(rate / (1 - rate))),
        ("dr_grpo", 1 - rate, -rate),
    ):
        advantage_A = build_algorithm(name).advantage(answers)
        assert advantage_A[0].item() == pytest.approx(right, rel=1e-14)
        assert advantage_A[-1].item() == pytest.approx(wrong, rel=1e-14)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_answers_that_all_agree_have_no_advantage(value):
    for normalise in (True, False):
        advantage_A = group_advantage(torch.full((6,), value, dtype=FLOAT64), torch.zeros(6).long(), normalise=normalise)
        assert advantage_A.abs().max() < 1e-15


def test_the_gradient_vanishes_beyond_the_clip_on_the_pushed_side_alone():
    batch = tokens([0.1, math.log(1.3), math.log(0.7), -0.1, math.log(1.3), math.log(0.7)], [1.0] * 3 + [-1.0] * 3)
    loss = build_algorithm("grpo").token_loss(batch)
    (gradient,) = torch.autograd.grad(loss.loss_N.sum(), batch.logprob_N)
    assert gradient.tolist() == pytest.approx([-math.exp(0.1), 0.0, -0.7, math.exp(-0.1), 1.3, 0.0])
    assert loss.loss_N.tolist() == pytest.approx([-math.exp(0.1), -1.28, -0.7, math.exp(-0.1), 1.3, 0.8])
    assert loss.clamped_N.tolist() == [False, True, False, False, False, True]
    assert clipped_coefficient(batch).tolist() == gradient.tolist()


@pytest.mark.parametrize("advantage", [1.5, -0.5])
@pytest.mark.parametrize("delta", [-2.0, -0.15, 0.0, 0.2, 3.0])
def test_gradient_is_the_central_difference_of_the_loss(delta, advantage):
    step = 1e-6
    values = [build_algorithm("dapo").token_loss(tokens([delta + shift], [advantage])).loss_N.item() for shift in (step, -step)]
    batch = tokens([delta], [advantage])
    assert clipped_coefficient(batch).item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-8, abs=1e-9)


def test_extreme_ratios_stay_finite_and_saturate():
    batch = tokens([-80.0, 10.0, 200.0, -80.0, 200.0], [-1.0, -1.0, -1.0, 1.0, 1.0], torch.float32)
    loss = build_algorithm("grpo").token_loss(batch)
    (gradient,) = torch.autograd.grad(loss.loss_N.sum(), batch.logprob_N)
    assert torch.isfinite(loss.loss_N).all()
    assert gradient.tolist() == pytest.approx([0.0, math.exp(10), math.exp(10), -math.exp(-80), 0.0], rel=1e-5)


@pytest.mark.parametrize(("prompt_weight", "name"), [("sqrt_odds", "grpo"), ("one_minus_rate", "dr_grpo")])
@pytest.mark.parametrize("epsilon", [1.0, 0.2])
@pytest.mark.parametrize("num_correct", [1, 5, 8, 15])
def test_on_policy_nft_has_the_same_gradient(prompt_weight, name, epsilon, num_correct):
    """Propositions 4.2 and Remark A.3 between the functions that train: a tiny softmax policy, K = 16, R = 1."""
    generator = torch.Generator().manual_seed(num_correct)
    parameters = torch.randn(7, 11, dtype=FLOAT64, generator=generator).requires_grad_()
    tokens_KT = torch.randint(11, (16, 7), generator=generator)
    logprob_N = parameters.log_softmax(-1).expand(16, -1, -1).gather(2, tokens_KT[..., None]).flatten()
    correct_K, rate_K = torch.arange(16) < num_correct, torch.full((16,), num_correct / 16, dtype=FLOAT64)
    answers = AnswerBatch(torch.zeros(16).long(), correct_K, rate_K, torch.full((16,), 7), correct_K & False, 8)
    row_N = torch.arange(16).repeat_interleave(7)
    gradients = []
    for algorithm in (build_algorithm("nft", prompt_weight=prompt_weight, epsilon=epsilon), build_algorithm(name)):
        advantage_A = algorithm.advantage(answers)
        batch = TokenBatch(
            logprob_N, logprob_N.detach(), correct_K[row_N], rate_K[row_N], None if advantage_A is None else advantage_A[row_N]
        )
        loss = (algorithm.weight(answers)[row_N] * algorithm.token_loss(batch).loss_N).sum()
        gradients += torch.autograd.grad(loss, parameters, retain_graph=True)
    assert (gradients[0] - gradients[1]).norm() < 1e-10 * gradients[1].norm()
