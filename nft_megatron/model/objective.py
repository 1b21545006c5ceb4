"""The weighted loss of a micro-batch as a function of its log-probs, for every coupling of an algorithm.

    "token":               Σ_n (ω/D)_n · ℓ(logprob_n)                  any subset of the tokens by itself
    "sequence", "group":   Σ_a (ω/D)_a · ℓ_a(S),  S_a = Σ_n log R_n     over all tokens of an answer, on any context rank

Suffix ``_N``: one entry per loss token of this rank; ``_C``: of a chunk of them; ``_A``: one entry per answer of the
micro-batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nft_megatron.algorithms import Algorithm, TokenBatch, TokenLoss
from nft_megatron.batching.batch import MicroBatch


class Measured(NamedTuple):
    """The loss of a micro-batch as its log-probs determine it; nothing is differentiable.

    ``right`` and ``wrong`` are the weighted loss of right and of wrong answers, this rank's share. ``gradient_N`` is its
    derivative in each log-prob, ω/D included. ``clamped_N`` as in :class:`.TokenLoss`.
    """

    right: Tensor
    wrong: Tensor
    gradient_N: Tensor
    clamped_N: Tensor


def token_loss(algorithm: Algorithm, batch: MicroBatch, logprob_C: Tensor, tokens: slice) -> TokenLoss:
    """ω·ℓ/D of ``tokens``, differentiable in their log-probs ``logprob_C``."""
    assert batch.old_logprob_N is not None, "Trainer.prepare fills it on the last stage"
    advantage_C = None if batch.advantage_N is None else batch.advantage_N[tokens]
    old_C, is_correct_C, rate_C = batch.old_logprob_N[tokens], batch.is_correct_N[tokens], batch.correct_rate_N[tokens]
    result = algorithm.token_loss(TokenBatch(logprob_C, old_C, is_correct_C, rate_C, advantage_C))
    return result._replace(loss_N=batch.weight_N[tokens] * result.loss_N)


def sequence_loss(algorithm: Algorithm, batch: MicroBatch, logprob_N: Tensor, context_group: dist.ProcessGroup) -> Tensor:
    """ω·ℓ/D of every answer, the same on all ranks of ``context_group``, shape A.

    Its derivative in ``logprob_N`` is that of the one loss they all share, so gradients sum over the ranks as those of token
    losses do.
    """
    answers = batch.answers
    assert batch.old_logprob_N is not None and answers is not None and answers.weight_A is not None
    delta_N = logprob_N - batch.old_logprob_N
    local_A = delta_N.new_zeros(len(answers.weight_A)).index_add(0, batch.packed.answer_N, delta_N)
    return answers.weight_A * algorithm.sequence_loss(answers, _SumOverRanks.apply(local_A, context_group))


def measure(algorithm: Algorithm, batch: MicroBatch, logprob_N: Tensor, context_group: dist.ProcessGroup) -> Measured:
    """See :class:`Measured`. A collective of ``context_group`` if the loss is over whole answers."""
    with torch.enable_grad():
        logprob_N = logprob_N.detach().requires_grad_()
        if algorithm.coupling == "token":
            loss, clamped_N = token_loss(algorithm, batch, logprob_N, slice(None))
            share, is_correct = loss, batch.is_correct_N
        else:
            assert batch.answers is not None
            loss, clamped_N = sequence_loss(algorithm, batch, logprob_N, context_group), torch.zeros_like(batch.is_correct_N)
            share, is_correct = loss / context_group.size(), batch.answers.is_correct_A  # every rank has the whole loss
        (gradient_N,) = torch.autograd.grad(loss.sum(), logprob_N)
    share = share.detach()
    return Measured(share.where(is_correct, 0.0).sum(), share.where(~is_correct, 0.0).sum(), gradient_N, clamped_N)


class _SumOverRanks(torch.autograd.Function):
    """Sum over the ranks of a group. Each rank then computes the same loss, and its gradient passes to the rank's own part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.clone()
        if group.size() > 1:
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None
