"""Log-probs, entropy and gradients against full float64 logits and automatic differentiation, on one and on two ranks."""

import pytest
import torch
from lm_head_reference import HIDDEN, VOCAB, assert_all_close, problem, reference
from logprob_worker import CASES, ours, run_rank

from nft_megatron.model import lm_head
from nft_megatron.model.logprob import token_logprobs


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Three tokens of 64 rows of the vocabulary, or twelve rows of the weight."""
    monkeypatch.setitem(lm_head.BLOCK_ELEMENTS, "cpu", 200)


@pytest.mark.parametrize("entropy", ["value", "gradient"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_size", [8, 37, 1024])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_values_and_gradients_on_one_rank(dtype, tolerance, chunk_size, temperature, entropy):
    inputs = problem(dtype=dtype)
    actual = ours(*inputs, temperature, chunk_size=chunk_size, entropy=entropy)
    assert actual[0].dtype == actual[1].dtype == dtype
    assert_all_close(actual, reference(*inputs, temperature, entropy), tolerance)
    assert actual[3][VOCAB:].eq(0).all()


@pytest.mark.parametrize("entropy", ["value", "gradient"])
def test_bfloat16_is_as_near_as_bfloat16_logits_allow(entropy):
    inputs = problem(num_tokens=400, dtype=torch.bfloat16)
    actual, expected = ours(*inputs, 1.0, entropy=entropy), reference(*inputs, 1.0, entropy)
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


def test_gradients_are_those_of_finite_differences():
    hidden, weight, targets, _ = problem(num_tokens=3, dtype=torch.float64)

    def function(hidden, weight):
        return token_logprobs(
            hidden, weight, targets, temperature=0.8, vocab_size=VOCAB, group=None, chunk_size=2, entropy="gradient"
        )

    assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), weight.requires_grad_()))


def test_entropy_only_when_asked_and_its_gradient_only_when_asked():
    hidden, weight, targets, _ = problem()
    hidden.requires_grad_()
    options = {"temperature": 1.0, "vocab_size": VOCAB, "group": None}
    assert token_logprobs(hidden, weight, targets, **options).entropy_N is None
    value = token_logprobs(hidden, weight, targets, **options, entropy="value")
    assert value.logprob_N.requires_grad
    assert not value.entropy_N.requires_grad
    assert torch.equal(value.entropy_N, token_logprobs(hidden, weight, targets, **options, entropy="gradient").entropy_N)


def test_entropy_alone_may_carry_a_gradient():
    hidden, weight, targets, upstream = problem(dtype=torch.float64)
    upstream[0] = 0
    hidden.requires_grad_()
    _, entropies = token_logprobs(hidden, weight, targets, temperature=1.0, vocab_size=VOCAB, group=None, entropy="gradient")
    (entropies * upstream[1]).sum().backward()
    torch.testing.assert_close(hidden.grad, reference(hidden, weight, targets, upstream, 1.0, "gradient")[2])


def test_a_large_weight_of_the_entropy_leaves_padding_without_gradient():
    hidden, weight, targets, upstream = problem()
    *_, hidden_grad, weight_grad = ours(hidden, weight, targets, upstream * 1e6, 1.0, entropy="gradient")
    assert hidden_grad.isfinite().all()
    assert weight_grad[VOCAB:].eq(0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.01)])
def test_main_grad_takes_the_weights_gradient_and_hooks_see_zero(dtype, tolerance):
    hidden, weight, targets, upstream = problem(dtype=dtype)
    *_, expected_hidden, expected_weight = reference(hidden, weight, targets, upstream, 1.0)
    hidden.requires_grad_()
    weight.requires_grad_()
    seen = []
    accumulator = weight.expand_as(weight).grad_fn.next_functions[0][0]  # hooked as by Megatron's DDP
    accumulator.register_hook(lambda *_: seen.append(weight.grad))
    main_grad = torch.ones(weight.shape)
    options = {"temperature": 1.0, "vocab_size": VOCAB, "group": None, "main_grad_VH": main_grad, "chunk_size": 8}
    for calls in (1, 2):
        weight.grad = hidden.grad = None
        logprob_N = token_logprobs(hidden, weight, targets, **options).logprob_N
        assert calls == 2 or main_grad.eq(1).all()  # nothing before the backward pass
        (logprob_N * upstream[0]).sum().backward()
        error = main_grad.double() - 1 - calls * expected_weight
        assert error.norm() < tolerance * calls * expected_weight.norm()
        assert (hidden.grad.double() - expected_hidden).norm() < tolerance * expected_hidden.norm()
        assert len(seen) == calls
        assert seen[-1].dtype == dtype and seen[-1].eq(0).all()


def test_a_tied_embeddings_own_gradient_joins_in_main_grad():
    _, weight, targets, upstream = problem(dtype=torch.float64)
    tokens = targets.roll(1)

    def backward(weight, logprobs):
        (logprobs(torch.tanh(weight[tokens]), weight) * upstream[0]).sum().backward()

    expected = weight.clone().requires_grad_()
    backward(expected, lambda hidden, weight: (hidden @ weight[:VOCAB].T).log_softmax(-1)[range(len(targets)), targets])
    weight.requires_grad_()
    main_grad = torch.zeros_like(weight)
    options = {"temperature": 1.0, "vocab_size": VOCAB, "group": None, "main_grad_VH": main_grad}
    backward(weight, lambda hidden, weight: token_logprobs(hidden, weight, targets, **options).logprob_N)
    torch.testing.assert_close(main_grad + weight.grad, expected.grad)  # which Megatron's hook adds up


def test_a_frozen_head_or_hidden_state_gets_no_gradient():
    hidden, weight, targets, upstream = problem(dtype=torch.float64)
    expected = reference(hidden, weight, targets, upstream, 1.0)
    for trained, gradient in ((hidden, expected[2]), (weight, expected[3])):
        trained.requires_grad_()
        logprob_N = token_logprobs(hidden, weight, targets, temperature=1.0, vocab_size=VOCAB, group=None).logprob_N
        logprob_N.backward(upstream[0])
        torch.testing.assert_close(trained.grad, gradient)
        trained.requires_grad_(False)
    assert weight.grad is not None
    assert hidden.grad is not None


@pytest.fixture(scope="module")
def two_ranks(world, tmp_path_factory):
    """What two gloo ranks computed for each of ``CASES``: ``[rank][case]``, log-probs and then the one-pass loss."""
    folder = tmp_path_factory.mktemp("ranks")
    world(2)(run_rank, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=str)
def test_two_tensor_parallel_ranks_make_one(two_ranks, case):
    dtype, padded, num_tokens = CASES[case]
    expected = reference(*problem(num_tokens, padded, dtype), temperature=0.7, entropy="gradient")
    first, second = two_ranks[0][case][0], two_ranks[1][case][0]
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    whole = (first[0], first[1], first[2] + second[2], torch.cat([first[3], second[3]]))
    if num_tokens:
        assert_all_close(whole, expected, 1e-14 if dtype == torch.float64 else 2e-6)
        assert whole[0].max() <= 0
    assert [tensor.shape for tensor in whole] == [tensor.shape for tensor in expected]
    assert whole[3][VOCAB:].eq(0).all()


@pytest.mark.parametrize("case", range(len(CASES)), ids=str)
def test_two_tensor_parallel_ranks_make_one_loss(two_ranks, case):
    dtype, padded, num_tokens = CASES[case]
    inputs = problem(num_tokens, padded, dtype)
    logprob, _, *gradients = reference(*inputs, temperature=0.7)
    expected = ((logprob * inputs[3][0]).sum(), logprob, *gradients)
    first, second = two_ranks[0][case][1], two_ranks[1][case][1]
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], two_ranks[0][case][0][0])  # bit for bit the log-probs of two passes
    whole = (first[0], first[1], first[2] + second[2], torch.cat([first[3], second[3]]))
    assert [tensor.shape for tensor in whole] == [tensor.shape for tensor in expected]
    if num_tokens:
        assert_all_close(whole, expected, 1e-14 if dtype == torch.float64 else 2e-6)
    else:
        assert whole[0] == 0
        assert whole[3].eq(0).all()
