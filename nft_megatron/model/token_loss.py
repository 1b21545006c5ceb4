"""The sum of a token loss through a vocabulary-parallel LM head, with its gradient computed in the forward pass.

    loss = Σ_n loss_n(logprob_n)        logprob_n = log softmax(hidden_n · weightᵀ / temperature) at target n

For a loss that is a sum over tokens, the gradient in a token's log-prob is known as soon as that log-prob is. So a chunk's
logits become their own gradient, and then a share of dHidden and dWeight, before the next chunk's are computed: 6·N·H·V
floating-point operations instead of the 8 of :func:`.logprob.token_logprobs`, which has to recompute the logits in the
backward pass. Only the gradient of ``loss`` remains for the backward pass. Steps and shapes: :mod:`.lm_head`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nft_megatron.model.lm_head import Entropy, HeadGradients, LMHead, accurate, default_chunk_size

LossOf = Callable[[Tensor, slice], Tensor]


def token_loss_sum(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    loss_of: LossOf,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    main_grad_VH: Tensor | None = None,
    chunk_size: int | None = None,
    entropy_N: Tensor | None = None,
    fused: bool = True,
) -> tuple[Tensor, Tensor]:
    """Σ_n loss_n, differentiable, and ``logprob_N``, without gradient; both float32 (float64 for float64 inputs).

    The log-probs are bit for bit those of :func:`.logprob.token_logprobs`. Without gradients (``torch.no_grad``) none are
    computed.

    Args:
        hidden_NH, weight_VH, targets_N, temperature, vocab_size, group, chunk_size, fused: as for ``token_logprobs``.
        loss_of: maps the log-probs of the tokens ``chunk``, a slice into N, and ``chunk`` itself to the loss of each token:
            weighted, differentiable in its log-prob, and independent of the others. Called once per chunk; never for N = 0.
        main_grad_VH: if given, **this call** adds the weight's gradient to it, in its own dtype, and autograd sees a zero for
            the weight. So the result must enter the total loss with factor 1, as in Megatron's schedule without a scaler; the
            backward pass asserts it.
        entropy_N: if given, filled with the entropy of each token's distribution, in nats; of the result's dtype.

    >>> hidden_NH, weight_VH = torch.eye(2, requires_grad=True), torch.tensor([[0.0, 0.0], [0.0, 9.0]])
    >>> targets_N, weight_N = torch.tensor([0, 1]), torch.tensor([10.0, 1.0])
    >>> loss, logprob_N = token_loss_sum(
    ...     hidden_NH,
    ...     weight_VH,
    ...     targets_N,
    ...     lambda logprob_C, chunk: -weight_N[chunk] * logprob_C,
    ...     temperature=1.0,
    ...     vocab_size=2,
    ...     group=None,
    ... )
    >>> logprob_N.exp()
    tensor([0.5000, 0.9999])
    >>> loss.backward()
    >>> hidden_NH.grad[0]  # 10 · (1 − 0.5) · the row of token 1
    tensor([ 0., 45.])
    """
    entropy: Entropy = "none" if entropy_N is None else "value"
    head = LMHead(temperature, vocab_size, group, main_grad_VH, chunk_size or default_chunk_size(weight_VH), entropy, fused)
    return _TokenLossSum.apply(hidden_NH, weight_VH, targets_N, loss_of, head, torch.is_grad_enabled(), entropy_N)


class _TokenLossSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        loss_of: LossOf,
        head: LMHead,
        with_gradient: bool,
        entropy_N: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = (with_gradient and needs for needs in ctx.needs_input_grad[:2])
        gradients = HeadGradients(hidden_NH, weight_VH, head.main_grad_VH, needs_hidden, needs_weight)
        logprob_N = hidden_NH.new_empty(len(hidden_NH), dtype=accurate(hidden_NH.dtype))
        total = logprob_N.new_zeros(())
        for chunk in head.chunks(hidden_NH, weight_VH, targets_N):
            statistics = head.statistics(chunk)
            logprob_N[chunk.tokens] = statistics.logprob_C
            if entropy_N is not None and statistics.entropy_C is not None:
                entropy_N[chunk.tokens] = statistics.entropy_C
            with torch.set_grad_enabled(needs_hidden or needs_weight):
                logprob_C = statistics.logprob_C.requires_grad_()
                loss = loss_of(logprob_C, chunk.tokens).sum()
            total += loss.detach()
            if needs_hidden or needs_weight:
                (logprob_grad_C,) = torch.autograd.grad(loss, logprob_C)
                head.differentiate(chunk, statistics.log_sum_exp_C, logprob_grad_C)
                gradients.add(chunk)
            del chunk  # or the last one's memory would outlive the loop
        ctx.head = head
        ctx.save_for_backward(gradients.hidden_grad_NH, gradients.weight_grad_VH())
        ctx.mark_non_differentiable(logprob_N)
        return total, logprob_N

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad_NH, weight_grad_VH = ctx.saved_tensors
        if weight_grad_VH is not None:
            if ctx.head.main_grad_VH is None:
                weight_grad_VH = weight_grad_VH * loss_grad
            else:
                torch._assert_async(loss_grad == 1, "main_grad holds the gradient of the unscaled loss")
        return None if hidden_grad_NH is None else hidden_grad_NH * loss_grad, weight_grad_VH, None, None, None, None, None
