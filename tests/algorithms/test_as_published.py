"""Each departure of the authors' code from the paper, an option that is off by default, against formulas from its description.

R = exp(min(Δ, 10))                                     Δ of a token, or the sum over an answer
r̂ ← min(max(r̂, 0.02), 0.98)
right answers   −log R                                  wrong answers   −log max_v((1 − r̂R)/(1 − r̂), 1)
ω = 1 − r̂                                               loss = Σ ω·ℓ / 1000 over tokens, averaged over data-parallel ranks
"""

import math

import pytest
import torch

from nft_megatron.algorithms import AnswerBatch, TokenBatch, build_algorithm
from nft_megatron.batching.denominator import loss_denominator

PUBLISHED = {"beyond_cap": "zero", "rate_margin": 0.02}
FLOAT64 = torch.float64
DELTAS = [-30.0, -3.0, -0.1, 0.0, 0.1, 2.0, 9.99, 10.0, 10.01, 12.0, 40.0]
RATES = [1 / 64, 1 / 16, 0.5, 15 / 16, 63 / 64]


def batch_of(delta, is_correct, rate, dtype=FLOAT64):
    delta_N = torch.tensor(delta, dtype=dtype, requires_grad=True)
    return TokenBatch(
        delta_N, torch.zeros_like(delta_N), torch.full_like(delta_N, is_correct).bool(), torch.full_like(delta_N, rate)
    )


def as_described(delta_N, is_correct, rate):
    """ω·ℓ; torch's clamp has the derivative 1 at and below its bound and 0 beyond it."""
    ratio_N, rate = delta_N.clamp(max=10).exp(), min(max(rate, 0.02), 0.98)
    x_N = (1 - rate * ratio_N) / (1 - rate)
    max_v_N = x_N + (x_N.clamp(min=1) - x_N).detach()
    return (1 - rate) * -(ratio_N if is_correct else max_v_N).log()


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("is_correct", [True, False])
def test_token_losses_and_gradients_are_those_of_the_description(rate, is_correct):
    batch = batch_of(DELTAS, is_correct, rate)
    algorithm = build_algorithm("nft", **PUBLISHED)
    answers = AnswerBatch(torch.arange(1), torch.ones(1) > 0, torch.tensor([rate], dtype=FLOAT64), *[torch.ones(1)] * 2, 8)
    loss_N = algorithm.weight(answers) * algorithm.token_loss(batch).loss_N
    expected_N = as_described(batch.logprob_N, is_correct, rate)
    (gradient_N,) = torch.autograd.grad(loss_N.sum(), batch.logprob_N)
    (expected_gradient_N,) = torch.autograd.grad(expected_N.sum(), batch.logprob_N)
    torch.testing.assert_close(loss_N, expected_N, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradient_N, expected_gradient_N, rtol=1e-9, atol=1e-12)
    beyond_N = batch.logprob_N.detach() > 10
    assert (gradient_N[beyond_N] == 0).all() and (gradient_N[~beyond_N] != 0).all()


@pytest.mark.parametrize("is_correct", [True, False])
def test_without_the_option_there_is_a_gradient_beyond_ten(is_correct):
    """−1 for right answers, the push at Δ = 10 for wrong ones: the two ways in which the option changes a gradient."""
    batch = batch_of([10.0, 12.0, 40.0], is_correct, 0.5)
    (gradient_N,) = torch.autograd.grad(build_algorithm("nft").token_loss(batch).loss_N.sum(), batch.logprob_N)
    assert gradient_N.tolist() == pytest.approx([-1.0] * 3 if is_correct else [math.exp(10)] * 3, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize("rate", [k / 16 for k in range(1, 16)])
def test_the_options_change_no_bit_of_what_they_do_not_concern(dtype, rate):
    """All r̂ that 16 answers can have are within [0.02, 0.98]; Δ up to 10 is not capped."""
    for is_correct in (True, False):
        batch = batch_of([delta for delta in DELTAS if delta <= 10], is_correct, rate, dtype)
        found = []
        for options in ({}, PUBLISHED):
            result = build_algorithm("nft", **options).token_loss(batch)
            found.append((result.loss_N, result.clamped_N, *torch.autograd.grad(result.loss_N.sum(), batch.logprob_N)))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_of_64_answers_the_bounds_of_the_rate_change_the_gradient():
    """r̂ = 63/64: ω·a = r̂ at Δ = 0, so that the bound changes it by 0.98/(63/64); right answers' ω by 0.02/(1/64)."""
    gradients = {}
    for is_correct in (True, False):
        batch = batch_of([0.0], is_correct, 63 / 64)
        rate_A = batch.correct_rate_N
        answers = AnswerBatch(torch.arange(1), batch.is_correct_N, rate_A, torch.ones(1), torch.zeros(1), 8)
        for margin in (0.0, 0.02):
            algorithm = build_algorithm("nft", rate_margin=margin)
            loss = (algorithm.weight(answers) * algorithm.token_loss(batch).loss_N).sum()
            gradients[is_correct, margin] = torch.autograd.grad(loss, batch.logprob_N)[0].item()
    assert gradients[False, 0.02] / gradients[False, 0.0] == pytest.approx(0.98 / (63 / 64))
    assert gradients[True, 0.02] / gradients[True, 0.0] == pytest.approx(0.02 / (1 / 64))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("is_correct", [True, False])
def test_whole_answers_as_described(rate, is_correct):
    """S = Σ Δ_t is capped, not each Δ_t; all tokens of an answer have its gradient."""
    lengths = [1, 7, 40]
    delta = [torch.full((length,), 0.5, dtype=FLOAT64, requires_grad=True) for length in lengths]  # S = 0.5, 3.5, 20
    log_ratio_A = torch.stack([each.sum() for each in delta])
    rate_A = torch.full((3,), rate, dtype=FLOAT64)
    answers = AnswerBatch(torch.arange(3), torch.full((3,), is_correct), rate_A, torch.tensor(lengths), torch.zeros(3), 64)
    algorithm = build_algorithm("nft", ratio_type="sequence", **PUBLISHED)
    loss_A = algorithm.weight(answers) * algorithm.sequence_loss(answers, log_ratio_A)
    torch.testing.assert_close(loss_A, as_described(log_ratio_A, is_correct, rate), rtol=1e-9, atol=1e-12)
    gradients = torch.autograd.grad(loss_A.sum(), delta, retain_graph=True)
    expected = torch.autograd.grad(as_described(log_ratio_A, is_correct, rate).sum(), delta)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert (gradients[2] == 0).all() and (gradients[1] != 0).all()


@pytest.mark.parametrize(("num_ranks", "published"), [(32, 32_000), (16, 16_000)])  # 32 GPUs; 128, eight of them a sequence
def test_the_fixed_denominator_is_that_of_the_average_over_ranks(num_ranks, published):
    """Σ_tokens ω·ℓ / 1000 of each rank's answers, gradients averaged over ranks, on a mini-batch of 4 answers a rank."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (num_ranks, 4), generator=generator)
    logprobs = [torch.randn(int(n), dtype=FLOAT64, generator=generator).requires_grad_() for n in lengths.flatten()]
    losses = [as_described(each, number % 2 == 0, 0.25).sum() for number, each in enumerate(logprobs)]
    by_rank = [sum(losses[4 * rank : 4 * rank + 4]) / 1000 for rank in range(num_ranks)]
    theirs = torch.autograd.grad(sum(by_rank) / num_ranks, logprobs, retain_graph=True)
    counts = lengths.flatten().tolist()
    fixed = torch.autograd.grad(sum(losses) / loss_denominator(published, counts), logprobs, retain_graph=True)
    ours = torch.autograd.grad(sum(losses) / loss_denominator("tokens", counts), logprobs)
    for one, other, default in zip(theirs, fixed, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
        torch.testing.assert_close(one, default * (sum(counts) / published), rtol=1e-12, atol=0)
