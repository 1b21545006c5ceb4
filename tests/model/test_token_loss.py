"""The one-pass loss against float64 formulas on full logits, and against log-probs in two passes."""

import pytest
import torch
from lm_head_reference import HIDDEN, VOCAB, full_logprobs, problem
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nft_megatron.algorithms import TokenBatch, build_algorithm
from nft_megatron.model import lm_head
from nft_megatron.model.logprob import token_logprobs
from nft_megatron.model.token_loss import token_loss_sum

EPSILON, TEMPERATURE = 0.6, 0.8
OPTIONS = {"temperature": TEMPERATURE, "vocab_size": VOCAB, "group": None, "chunk_size": 8}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Three tokens of 64 rows of the vocabulary, or twelve rows of the weight."""
    monkeypatch.setitem(lm_head.BLOCK_ELEMENTS, "cpu", 200)


def nft_problem(dtype=torch.float32, num_tokens=37):
    """Hidden states, weight, targets, and of every token: weight, old log-prob, verdict, rate of right answers."""
    hidden, weight, targets, noise = problem(num_tokens, dtype=dtype)
    logprob = full_logprobs(hidden.double(), weight.double(), TEMPERATURE).gather(1, targets[:, None]).squeeze(1)
    old_logprob = (logprob + 0.5 * noise[0]).clamp(max=0).to(noise.dtype)
    is_correct = torch.arange(num_tokens) % 3 == 0
    rate = torch.linspace(0.1, 0.9, num_tokens).to(noise.dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, (noise[1].abs(), old_logprob, is_correct, rate)


def nft_loss(tokens, logprob, chunk=slice(None)):
    """The weighted loss of the package's own NFT."""
    weight, old_logprob, is_correct, rate = (each[chunk] for each in tokens)
    algorithm = build_algorithm("nft", epsilon=EPSILON)
    return weight * algorithm.token_loss(TokenBatch(logprob, old_logprob, is_correct, rate)).loss_N


def nft_reference(hidden, weight, targets, tokens):
    """Eq. 10 of the paper as it stands, in float64 and by automatic differentiation: loss and the two gradients."""
    hidden, weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    token_weight, old_logprob, is_correct, rate = (each if each.dtype == torch.bool else each.double() for each in tokens)
    logprob = full_logprobs(hidden, weight, TEMPERATURE).gather(1, targets[:, None]).squeeze(1)
    ratio = (logprob - old_logprob).exp()
    negative = (1 - rate * ratio) / (1 - rate)
    clamped = (negative.clamp(min=EPSILON) - negative).detach() + negative
    loss = (token_weight * torch.where(is_correct, -ratio.log(), -clamped.log())).sum()
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 5e-6), (torch.bfloat16, 0.03)])
def test_nft_in_one_pass_is_nft_on_full_logits(dtype, tolerance):
    hidden, weight, targets, tokens = nft_problem(dtype)
    loss, _ = token_loss_sum(hidden, weight, targets, lambda *args: nft_loss(tokens, *args), **OPTIONS)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    actual = (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))
    for mine, exact in zip(actual, nft_reference(hidden, weight, targets, tokens), strict=True):
        assert (mine.double() - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_is_two_passes(dtype):
    hidden, weight, targets, tokens = nft_problem(dtype)
    loss, logprob = token_loss_sum(hidden, weight, targets, lambda *args: nft_loss(tokens, *args), **OPTIONS)
    in_two, entropy_in_two = token_logprobs(hidden, weight, targets, **OPTIONS, entropy="value")
    expected = nft_loss(tokens, in_two).sum()
    assert torch.equal(logprob, in_two)
    entropy = torch.full_like(logprob, torch.nan)
    again = token_loss_sum(hidden, weight, targets, lambda *args: nft_loss(tokens, *args), **OPTIONS, entropy_N=entropy)
    assert torch.equal(entropy, entropy_in_two) and torch.equal(again[1], logprob) and torch.equal(again[0], loss)
    torch.testing.assert_close(loss, expected)
    for mine, theirs in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_the_gradient_scales_with_that_of_the_loss():
    hidden, weight, targets, tokens = nft_problem(torch.float64)
    loss, _ = token_loss_sum(hidden, weight, targets, lambda *args: nft_loss(tokens, *args), **OPTIONS)
    expected = nft_reference(hidden, weight, targets, tokens)[1:]
    (-2.5 * loss).backward()
    torch.testing.assert_close(hidden.grad, -2.5 * expected[0])
    torch.testing.assert_close(weight.grad, -2.5 * expected[1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_main_grad_takes_the_weights_gradient_in_the_forward_pass(dtype, tolerance):
    hidden, weight, targets, tokens = nft_problem(dtype)
    _, expected_hidden, expected_weight = nft_reference(hidden, weight, targets, tokens)
    main_grad = torch.ones(weight.shape)
    for calls in (1, 2):
        loss, _ = token_loss_sum(
            hidden, weight, targets, lambda *args: nft_loss(tokens, *args), **OPTIONS, main_grad_VH=main_grad
        )
        error = main_grad.double() - 1 - calls * expected_weight
        assert error.norm() < tolerance * calls * expected_weight.norm()
        hidden.grad = weight.grad = None
        loss.backward()
        assert weight.grad.shape == weight.shape and weight.grad.eq(0).all()
        assert (hidden.grad.double() - expected_hidden).norm() < tolerance * expected_hidden.norm()


def test_main_grad_refuses_a_scaled_loss():
    hidden, weight, targets, tokens = nft_problem()
    loss, _ = token_loss_sum(
        hidden, weight, targets, lambda *args: nft_loss(tokens, *args), **OPTIONS, main_grad_VH=torch.zeros(weight.shape)
    )
    with pytest.raises(RuntimeError, match="unscaled loss"):
        (loss / 2).backward()


def test_without_gradients_none_is_made():
    hidden, weight, targets, tokens = nft_problem(torch.float64)
    main_grad, graphs = torch.zeros_like(weight), []

    def loss_of(logprob, chunk):
        loss = nft_loss(tokens, logprob, chunk)
        graphs.append(loss.requires_grad)
        return loss

    with torch.no_grad():
        loss, logprob = token_loss_sum(hidden, weight, targets, loss_of, **OPTIONS, main_grad_VH=main_grad)
    torch.testing.assert_close(loss, nft_reference(hidden, weight, targets, tokens)[0])
    assert not loss.requires_grad and not logprob.requires_grad
    assert graphs == [False] * 5  # 37 tokens in chunks of 8
    assert main_grad.eq(0).all()


def test_a_frozen_head_or_hidden_state_gets_no_gradient():
    for frozen in (0, 1):
        *trained, targets, tokens = nft_problem(torch.float64)
        expected = nft_reference(*trained, targets, tokens)[1:]
        trained[frozen].requires_grad_(False)
        token_loss_sum(*trained, targets, lambda *args, tokens=tokens: nft_loss(tokens, *args), **OPTIONS)[0].backward()
        assert trained[frozen].grad is None
        torch.testing.assert_close(trained[1 - frozen].grad, expected[1 - frozen])


class LargestResult(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


def test_all_logits_never_exist_together():
    hidden, weight, targets, upstream = problem(num_tokens=1024, padded=64)
    hidden.requires_grad_()
    weight.requires_grad_()
    for backward in (
        lambda: token_loss_sum(hidden, weight, targets, lambda logprob, chunk: upstream[0, chunk] * logprob, **OPTIONS)[0],
        lambda: sum(token.sum() for token in token_logprobs(hidden, weight, targets, **OPTIONS, entropy="gradient")),
    ):
        weight.grad = None
        with LargestResult() as mode:
            backward().backward()
        assert weight.grad is not None
        assert mode.largest == hidden.numel() < 1024 * VOCAB


@pytest.mark.parametrize("with_main_grad", [False, True])
def test_no_tokens_are_a_zero_loss_with_zero_gradients(with_main_grad):
    hidden, weight, targets, tokens = nft_problem(num_tokens=0)
    main_grad = torch.zeros(weight.shape) if with_main_grad else None
    loss, logprob = token_loss_sum(
        hidden, weight, targets, lambda *args: nft_loss(tokens, *args), **OPTIONS, main_grad_VH=main_grad
    )
    assert loss.item() == 0 and loss.grad_fn is not None
    assert logprob.shape == (0,) and not logprob.requires_grad
    loss.backward()
    assert hidden.grad.shape == (0, HIDDEN)
    assert weight.grad.shape == weight.shape and weight.grad.eq(0).all()
    assert main_grad is None or main_grad.eq(0).all()
