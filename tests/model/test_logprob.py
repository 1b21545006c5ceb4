"""Log-probs, entropy and gradients against full float64 logits and automatic differentiation, on one and on two ranks.

Run as a script this file is one of the ranks: ``test_logprob.py RANK FOLDER``.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nft_megatron.model.logprob import token_logprobs

HIDDEN, VOCAB = 16, 50


def problem(num_tokens=37, padded=64, dtype=torch.float32, scale=1.0, seed=0):
    """Hidden states, an LM head with non-zero padding rows, targets, and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(padded, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, (num_tokens,), generator=generator)
    upstream = torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), targets, upstream.to(torch.promote_types(dtype, torch.float32))


def reference(hidden, weight, targets, upstream, temperature):
    """Everything in float64 from the full logits of the true vocabulary: log-probs, entropy and the two gradients."""
    hidden, weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    all_logprobs = (hidden @ weight[:VOCAB].T / temperature).log_softmax(-1)
    logprob = all_logprobs.gather(1, targets[:, None]).squeeze(1)
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    hidden_grad, weight_grad = torch.autograd.grad((logprob * upstream.double()).sum(), (hidden, weight))
    return logprob.detach(), entropy.detach(), hidden_grad, weight_grad


def ours(hidden, weight, targets, upstream, temperature, group=None, chunk_size=8):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logprob, entropy = token_logprobs(
        hidden, weight, targets,
        temperature=temperature, vocab_size=VOCAB, group=group, chunk_size=chunk_size, with_entropy=True,
    )  # fmt: skip
    hidden_grad, weight_grad = torch.autograd.grad((logprob * upstream).sum(), (hidden, weight))
    return logprob.detach(), entropy, hidden_grad, weight_grad


def assert_all_close(actual, expected, tolerance):
    """Largest difference below ``tolerance`` times the largest value of the reference."""
    for name, a, e in zip(("logprob", "entropy", "hidden_grad", "weight_grad"), actual, expected, strict=True):
        error = (a.double() - e).abs().max().item() / max(1.0, e.abs().max().item())
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_size", [8, 37, 1024])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_values_and_gradients_on_one_rank(dtype, tolerance, chunk_size, temperature):
    inputs = problem(dtype=dtype)
    actual = ours(*inputs, temperature, chunk_size=chunk_size)
    assert actual[0].dtype == actual[1].dtype == dtype
    assert_all_close(actual, reference(*inputs, temperature), tolerance)
    assert actual[3][VOCAB:].eq(0).all()


def test_bfloat16_is_as_near_as_bfloat16_logits_allow():
    inputs = problem(num_tokens=400, dtype=torch.bfloat16)
    actual, expected = ours(*inputs, 1.0), reference(*inputs, 1.0)
    assert actual[0].dtype == torch.float32
    assert actual[2].dtype == actual[3].dtype == torch.bfloat16
    # A logit of size z is rounded by up to z·2⁻⁹, and a log-prob is the difference of two.
    largest_logit = (inputs[0].double() @ inputs[1].double().T).abs().max().item()
    assert (actual[0].double() - expected[0]).abs().max() < 2 * largest_logit * 2**-9
    for mine, exact in zip(actual[2:], expected[2:], strict=True):
        assert (mine.double() - exact).norm() < 0.01 * exact.norm()


def test_the_weights_gradient_is_summed_in_float32_over_chunks():
    # 4096 equal contributions one at a time: a bfloat16 sum would stop growing at 256 of them.
    hidden, weight = torch.ones(4096, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(4096, dtype=torch.int64)
    token_logprobs(hidden, weight, targets, temperature=1.0, vocab_size=2, group=None, chunk_size=1).logprob_N.sum().backward()
    assert weight.grad.tolist() == [[2048.0], [-2048.0]]  # 4096 · (1 − 1/2) and 4096 · (0 − 1/2)


@pytest.mark.parametrize("scale", [30.0, 1e3, 1e6])
def test_extreme_logits_stay_finite_and_at_most_zero(scale):
    inputs = problem(num_tokens=200, scale=scale)
    actual, expected = ours(*inputs, 1.0), reference(*inputs, 1.0)
    assert actual[0].max() <= 0
    assert all(tensor.isfinite().all() for tensor in actual)
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-5, atol=1e-5 * scale)


def test_log_probs_of_near_certain_tokens_are_not_positive():
    hidden, weight = torch.eye(HIDDEN).repeat(40, 1), torch.eye(VOCAB, HIDDEN) * torch.linspace(5, 120, HIDDEN)
    targets = torch.arange(HIDDEN).repeat(40)
    logprob_N = token_logprobs(hidden, weight, targets, temperature=1.0, vocab_size=VOCAB, group=None).logprob_N
    assert logprob_N.max() <= 0
    certain = -torch.log1p((VOCAB - 1) * torch.exp(-torch.linspace(5, 120, HIDDEN, dtype=torch.float64)))
    torch.testing.assert_close(logprob_N[:HIDDEN].double(), certain, rtol=1e-6, atol=1e-7)


def test_no_tokens_have_zero_gradients():
    hidden, weight, targets, upstream = problem(num_tokens=0)
    logprob, entropy, hidden_grad, weight_grad = ours(hidden, weight, targets, upstream, 1.0)
    assert logprob.shape == entropy.shape == (0,)
    assert hidden_grad.shape == (0, HIDDEN)
    assert weight_grad.shape == weight.shape
    assert weight_grad.eq(0).all()


def test_entropy_only_when_asked_and_without_gradient():
    hidden, weight, targets, _ = problem()
    options = {"temperature": 1.0, "vocab_size": VOCAB, "group": None}
    assert token_logprobs(hidden, weight, targets, **options).entropy_N is None
    asked = token_logprobs(hidden.requires_grad_(), weight, targets, **options, with_entropy=True)
    assert asked.logprob_N.requires_grad
    assert not asked.entropy_N.requires_grad


def test_a_frozen_head_or_hidden_state_gets_no_gradient():
    hidden, weight, targets, upstream = problem(dtype=torch.float64)
    expected = reference(hidden, weight, targets, upstream, 1.0)
    for trained, gradient in ((hidden, expected[2]), (weight, expected[3])):
        trained.requires_grad_()
        logprob_N = token_logprobs(hidden, weight, targets, temperature=1.0, vocab_size=VOCAB, group=None).logprob_N
        logprob_N.backward(upstream)
        torch.testing.assert_close(trained.grad, gradient)
        trained.requires_grad_(False)
    assert weight.grad is not None
    assert hidden.grad is not None


# 128 padded rows over two ranks: the second rank has nothing but padding.
CASES = [
    (dtype, padded, num_tokens)
    for dtype in (torch.float64, torch.float32)
    for padded, num_tokens in ((64, 37), (128, 37), (64, 0))
]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two gloo ranks computed for each of ``CASES``: ``[rank][case]``."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=str)
def test_two_tensor_parallel_ranks_make_one(two_ranks, case):
    dtype, padded, num_tokens = CASES[case]
    expected = reference(*problem(num_tokens, padded, dtype), temperature=0.7)
    first, second = two_ranks[0][case], two_ranks[1][case]
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    whole = (first[0], first[1], first[2] + second[2], torch.cat([first[3], second[3]]))
    if num_tokens:
        assert_all_close(whole, expected, 1e-14 if dtype == torch.float64 else 2e-6)
        assert whole[0].max() <= 0
    assert [tensor.shape for tensor in whole] == [tensor.shape for tensor in expected]
    assert whole[3][VOCAB:].eq(0).all()


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    for dtype, padded, num_tokens in CASES:
        hidden, weight, targets, upstream = problem(num_tokens, padded, dtype)
        results.append(ours(hidden, weight.chunk(2)[rank], targets, upstream, 0.7, group=dist.group.WORLD))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
