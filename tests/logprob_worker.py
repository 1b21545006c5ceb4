"""The package's log-probs, entropy and gradients for tests/model/test_logprob.py, on one rank and on each of two."""

from unittest import mock

import torch
import torch.distributed as dist
from lm_head_reference import VOCAB, problem

from nft_megatron.model import lm_head
from nft_megatron.model.logprob import token_logprobs
from nft_megatron.model.token_loss import token_loss_sum

# 128 padded rows on two ranks: the second rank has only padding.
CASES = [
    (dtype, padded, num_tokens)
    for dtype in (torch.float64, torch.float32)
    for padded, num_tokens in ((64, 37), (128, 37), (64, 0))
]


def ours(hidden, weight, targets, upstream, temperature, group=None, chunk_size=8, entropy="value"):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logprob, entropies = token_logprobs(
        hidden,
        weight,
        targets,
        temperature=temperature,
        vocab_size=VOCAB,
        group=group,
        chunk_size=chunk_size,
        entropy=entropy,
    )
    total = (logprob * upstream[0]).sum()
    if entropy == "gradient":
        total = total + (entropies * upstream[1]).sum()
    return logprob.detach(), entropies.detach(), *torch.autograd.grad(total, (hidden, weight))


def loss_of_one_pass(hidden, weight, targets, upstream, temperature, group=None):
    """``token_loss_sum`` of the log-probs times ``upstream[0]``, with the gradients of hidden states and weight."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss, logprob_N = token_loss_sum(
        hidden,
        weight,
        targets,
        lambda logprob_C, chunk: upstream[0, chunk] * logprob_C,
        temperature=temperature,
        vocab_size=VOCAB,
        group=group,
        chunk_size=8,
    )
    return loss.detach(), logprob_N, *torch.autograd.grad(loss, (hidden, weight))


def run_rank(folder):
    """One of two ranks: writes its results for ``CASES`` to ``folder``."""
    dist.init_process_group("gloo", init_method="env://")
    with mock.patch.dict(lm_head.BLOCK_ELEMENTS, cpu=200):
        torch.save(_results(dist.get_rank()), folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


def _results(rank):
    results = []
    for dtype, padded, num_tokens in CASES:
        hidden, weight, targets, upstream = problem(num_tokens, padded, dtype)
        weight = weight.chunk(2)[rank]
        logprobs = ours(hidden, weight, targets, upstream, 0.7, group=dist.group.WORLD, entropy="gradient")
        results.append((logprobs, loss_of_one_pass(hidden, weight, targets, upstream, 0.7, group=dist.group.WORLD)))
    return results
