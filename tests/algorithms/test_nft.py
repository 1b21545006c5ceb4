"""NFT and RFT against Eq. 10 written out in float64, and against GRPO and Dr. GRPO at R = 1."""

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nft_megatron.algorithms import AnswerBatch, TokenBatch, build_algorithm
from nft_megatron.algorithms.nft import nft_coefficient
from nft_megatron.algorithms.prompt_weights import PROMPT_WEIGHTS

FLOAT64 = torch.float64


def batch_of(delta, is_correct, rate, dtype=FLOAT64, old=-1.5):
    """A batch whose log-ratios are ``delta``; in float32 they are exact only when ``old`` is 0."""
    delta_N = torch.as_tensor(delta, dtype=dtype)
    old_N = torch.full_like(delta_N, old)
    return TokenBatch(
        logprob_N=(old_N + delta_N).requires_grad_(),
        old_logprob_N=old_N,
        is_correct_N=torch.as_tensor(is_correct).expand_as(delta_N),
        correct_rate_N=torch.as_tensor(rate, dtype=dtype).expand_as(delta_N),
    )


def answers_of(rate_A):
    """Answers of questions with these rates; nothing else about them matters to NFT and RFT."""
    return AnswerBatch(torch.arange(len(rate_A)), rate_A > 0, rate_A, torch.ones(len(rate_A)), rate_A < 0, length_limit=8)


def literal_eq10(batch, epsilon):
    """Eq. 10 and Algorithm 1's max_v as they are printed."""

    def max_v(x, floor):
        return (x.clamp(min=floor) - x).detach() + x

    r = batch.is_correct_N.to(batch.logprob_N.dtype)
    ratio = (batch.logprob_N - batch.old_logprob_N).exp()
    negative = (1 - batch.correct_rate_N * ratio) / (1 - batch.correct_rate_N)
    return -(r * ratio.log() + (1 - r) * max_v(negative, epsilon).log())


def loss_and_gradient(loss_N, logprob_N):
    (gradient_N,) = torch.autograd.grad(loss_N.sum(), logprob_N)
    return loss_N.detach(), gradient_N


deltas = st.floats(-20, 3)  # beyond, max_v as it is printed cancels: (ε − x) + x has an error of |x|·2⁻⁵³
rates = st.integers(1, 15).map(lambda k: k / 16)
epsilons = st.sampled_from([1.0, 0.5, 0.1, 1e-3])


@given(st.lists(deltas, min_size=1, max_size=20), st.booleans(), rates, epsilons)
@settings(deadline=None, max_examples=200)
def test_loss_and_gradient_are_those_of_eq_10(delta, is_correct, rate, epsilon):
    batch = batch_of(delta, is_correct, rate)
    ours = loss_and_gradient(build_algorithm("nft", epsilon=epsilon).token_loss(batch).loss_N, batch.logprob_N)
    literal = loss_and_gradient(literal_eq10(batch, epsilon), batch.logprob_N)
    for mine, reference in zip(ours, literal, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rate", [1 / 16, 0.5, 15 / 16])
@pytest.mark.parametrize("epsilon", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("delta", [-3.0, -0.2, 0.1, 0.7, 4.0])
def test_gradient_is_the_difference_quotient_of_the_straight_through_surrogate(delta, rate, epsilon):
    # The surrogate at Δ₀ is −log(c + x(Δ)) with the constant c = max(x(Δ₀), ε) − x(Δ₀). The step is imaginary, so that the
    # quotient neither cancels nor has an error of second order where the curvature is large.
    def ratio(d):
        return (1 - rate * cmath.exp(d)) / (1 - rate)

    constant = max(ratio(delta).real, epsilon) - ratio(delta).real
    h = 1e-20
    expected = -cmath.log(constant + ratio(delta + 1j * h)).imag / h

    batch = batch_of([delta], False, rate)
    token_loss = build_algorithm("nft", epsilon=epsilon).token_loss(batch)
    _, gradient = loss_and_gradient(token_loss.loss_N, batch.logprob_N)
    assert gradient.item() == pytest.approx(expected, rel=1e-9)
    assert nft_coefficient(batch, epsilon=epsilon).item() == gradient.item()
    assert token_loss.clamped_N.item() == (ratio(delta).real < epsilon)


def test_the_gradient_survives_the_clamp():
    # r̂ = 0.5, R = e²: x = 2 − e² < 0. The value is −log ε, the gradient a·R/ε = e²/0.1.
    batch = batch_of([2.0], False, 0.5)
    token_loss = build_algorithm("nft", epsilon=0.1).token_loss(batch)
    loss, gradient = loss_and_gradient(token_loss.loss_N, batch.logprob_N)
    assert token_loss.clamped_N.item()
    assert loss.item() == pytest.approx(-math.log(0.1), rel=1e-12)
    assert gradient.item() == pytest.approx(math.exp(2) / 0.1, rel=1e-12)


@pytest.mark.parametrize("is_correct", [True, False])
@pytest.mark.parametrize("rate", [1 / 16, 0.5, 15 / 16])
@pytest.mark.parametrize("epsilon", [1.0, 0.1, 1e-8])
@pytest.mark.parametrize("delta", [-50.0, -20.0, -1e-3, -1e-6, -1e-7, 1e-7, 1e-6, 1e-3, 0.1, 5.0])
def test_float32_keeps_its_full_precision(delta, rate, epsilon, is_correct):
    batch = batch_of([delta], is_correct, rate, torch.float32, old=0.0)
    exact = batch_of(batch.logprob_N.detach().double(), is_correct, rate, old=0.0)
    ours = loss_and_gradient(build_algorithm("nft", epsilon=epsilon).token_loss(batch).loss_N, batch.logprob_N)

    a, d = rate / (1 - rate), exact.logprob_N.item()
    x = max(1 - a * math.expm1(d), epsilon)
    value = -d if is_correct else -math.log1p(-a * math.expm1(d)) if x > epsilon else -math.log(epsilon)
    slope = -1.0 if is_correct else a * math.exp(d) / x
    assert ours[0].item() == pytest.approx(value, rel=1e-5, abs=1e-37)
    assert ours[1].item() == pytest.approx(slope, rel=1e-5, abs=1e-37)


@pytest.mark.parametrize("is_correct", [True, False])
@pytest.mark.parametrize("rate", [1 / 16, 15 / 16])
@pytest.mark.parametrize("epsilon", [1.0, 1e-8])
def test_extreme_log_ratios_stay_finite_and_saturate(rate, epsilon, is_correct):
    batch = batch_of([-50.0, 10.0, 50.0], is_correct, rate, torch.float32)
    loss, gradient = loss_and_gradient(build_algorithm("nft", epsilon=epsilon).token_loss(batch).loss_N, batch.logprob_N)
    if is_correct:
        assert loss.tolist() == [50.0, -10.0, -50.0]
        assert gradient.tolist() == [-1.0, -1.0, -1.0]
    else:
        a = rate / (1 - rate)
        plateau = a * math.exp(10) / epsilon
        assert loss.tolist() == pytest.approx([math.log(1 - rate), -math.log(epsilon), -math.log(epsilon)])
        assert gradient.tolist() == pytest.approx([a * math.exp(-50) * (1 - rate), plateau, plateau], rel=1e-5)


def test_negative_weight_scales_wrong_answers_alone():
    batch = batch_of([0.3, -0.4, 0.3, -0.4], torch.tensor([True, True, False, False]), 0.25)
    whole = loss_and_gradient(build_algorithm("nft").token_loss(batch).loss_N, batch.logprob_N)
    half = loss_and_gradient(build_algorithm("nft", negative_weight=0.5).token_loss(batch).loss_N, batch.logprob_N)
    scale = torch.tensor([1, 1, 0.5, 0.5], dtype=FLOAT64)
    for a, b in zip(half, whole, strict=True):
        torch.testing.assert_close(a, scale * b)


def test_rft_is_the_positive_term_with_weight_one():
    rft = build_algorithm("rft")
    assert not rft.uses_wrong_answers
    assert rft.weight(answers_of(torch.tensor([0.1, 0.9]))).tolist() == [1.0, 1.0]
    batch = batch_of([-2.0, 0.5, 0.5], torch.tensor([True, True, False]), 0.25)
    loss, gradient = loss_and_gradient(rft.token_loss(batch).loss_N, batch.logprob_N)
    assert loss.tolist() == [2.0, -0.5, 0.0]
    assert gradient.tolist() == [-1.0, -1.0, 0.0]


@pytest.mark.parametrize(("name", "expected"), [("one", 1.0), ("one_minus_rate", 0.75), ("sqrt_odds", math.sqrt(3))])
def test_prompt_weights(name, expected):
    weight = build_algorithm("nft", prompt_weight=name).weight(answers_of(torch.tensor([0.25], dtype=FLOAT64)))
    assert weight.item() == pytest.approx(expected, rel=1e-15)
    assert set(PROMPT_WEIGHTS) == {"one", "one_minus_rate", "sqrt_odds"}


def group_policy(seed, num_answers, num_correct, length=7, vocab=11):
    """A tiny softmax policy's parameters, and K answers' tokens with exactly ``num_correct`` right ones."""
    generator = torch.Generator().manual_seed(seed)
    parameters = torch.randn(length, vocab, dtype=FLOAT64, generator=generator).requires_grad_()
    tokens_KT = torch.randint(vocab, (num_answers, length), generator=generator)
    reward_K = torch.zeros(num_answers, dtype=FLOAT64)
    reward_K[torch.randperm(num_answers, generator=generator)[:num_correct]] = 1
    return parameters, tokens_KT, reward_K


def token_logprobs_KT(parameters, tokens_KT):
    return parameters.log_softmax(-1).expand(len(tokens_KT), -1, -1).gather(2, tokens_KT[..., None]).squeeze(2)


def grpo_loss(logprob_KT, old_KT, reward_K, normalise, clip=0.2):
    """Eq. 3 with the advantage of section 2.2: mean and population standard deviation over the group."""
    advantage_K = reward_K - reward_K.mean()
    if normalise:
        advantage_K = advantage_K / ((reward_K - reward_K.mean()) ** 2).mean().sqrt()
    ratio_KT = (logprob_KT - old_KT).exp()
    bounded_KT = ratio_KT.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio_KT * advantage_K[:, None], bounded_KT * advantage_K[:, None]).sum()


@pytest.mark.parametrize(("prompt_weight", "normalise"), [("sqrt_odds", True), ("one_minus_rate", False)])
@pytest.mark.parametrize("epsilon", [1.0, 0.2])
@pytest.mark.parametrize("num_correct", [1, 5, 8, 15])
def test_on_policy_gradient_is_that_of_grpo_and_dr_grpo(prompt_weight, normalise, epsilon, num_correct):
    parameters, tokens_KT, reward_K = group_policy(num_correct, 16, num_correct)
    old_KT = token_logprobs_KT(parameters, tokens_KT).detach()
    (expected,) = torch.autograd.grad(
        grpo_loss(token_logprobs_KT(parameters, tokens_KT), old_KT, reward_K, normalise), parameters
    )

    nft = build_algorithm("nft", prompt_weight=prompt_weight, epsilon=epsilon)
    rate_KT = torch.full_like(old_KT, num_correct / 16)
    batch = TokenBatch(
        logprob_N=token_logprobs_KT(parameters, tokens_KT).flatten(),
        old_logprob_N=old_KT.flatten(),
        is_correct_N=(reward_K == 1)[:, None].expand_as(old_KT).flatten(),
        correct_rate_N=rate_KT.flatten(),
    )
    loss = (PROMPT_WEIGHTS[nft.prompt_weight](batch.correct_rate_N) * nft.token_loss(batch).loss_N).sum()
    (gradient,) = torch.autograd.grad(loss, parameters)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert (gradient - expected).norm() < 1e-10 * expected.norm()


def test_off_policy_gradient_weights_are_those_of_eq_12():
    # With ω = sqrt((1 − r̂)/r̂) the weight on ∇R is A⁺/R for right and A⁻ / max(x, ε) for wrong answers.
    rate, epsilon = 0.3125, 0.4
    delta = torch.tensor([-1.0, -0.1, 0.2, 0.9], dtype=FLOAT64)
    positive, negative = math.sqrt((1 - rate) / rate), -math.sqrt(rate / (1 - rate))
    for is_correct in (True, False):
        batch = batch_of(delta, is_correct, rate)
        nft = build_algorithm("nft", prompt_weight="sqrt_odds", epsilon=epsilon)
        loss = (PROMPT_WEIGHTS[nft.prompt_weight](batch.correct_rate_N) * nft.token_loss(batch).loss_N).sum()
        (gradient,) = torch.autograd.grad(loss, batch.logprob_N)
        ratio = delta.exp()
        x = ((1 - rate * ratio) / (1 - rate)).clamp(min=epsilon)
        weight_on_ratio = positive / ratio if is_correct else negative / x
        torch.testing.assert_close(gradient, -weight_on_ratio * ratio, rtol=1e-12, atol=0)
