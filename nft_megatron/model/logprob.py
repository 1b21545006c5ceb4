"""Log-probs of given tokens under a vocabulary-parallel LM head, without ever holding all logits.

Logits exist for one chunk of tokens at a time, in the forward pass and again in the backward pass; in between only every
token's log-sum-exp is stored, and its entropy if that has a gradient. Formulas and shapes: :mod:`.lm_head`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nft_megatron.model.lm_head import Entropy, HeadGradients, LMHead, accurate, default_chunk_size


class LogProbs(NamedTuple):
    """``logprob_N`` ≤ 0, differentiable; ``entropy_N`` ≥ 0 of the same distribution, or None. In nats."""

    logprob_N: Tensor
    entropy_N: Tensor | None


def token_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    main_grad_VH: Tensor | None = None,
    chunk_size: int | None = None,
    entropy: Entropy = "none",
    fused: bool = True,
) -> LogProbs:
    """log softmax(hidden · weightᵀ / temperature) at ``targets_N``, float32 (float64 for float64 inputs).

    Forward and backward together take 8·N·H·V floating-point operations; :func:`.token_loss.token_loss_sum` takes 6.

    Args:
        hidden_NH: the same on all ranks of ``group``. Its gradient is this rank's part of a sum over ``group``: the caller's
            copy or gather region reduces it.
        weight_VH: this rank's rows of the LM head; its gradient is complete, and zero for padding.
        targets_N: token ids < ``vocab_size``, the true size of the vocabulary. N may be 0.
        group: the tensor-parallel ranks; None if one rank holds all rows.
        main_grad_VH: if given, the backward pass adds the weight's gradient to it, in its own dtype: ``main_grad`` of
            Megatron's DDP. Autograd then sees a zero for the weight, so that hooks on its gradient still run.
        chunk_size: tokens whose logits exist at once; None for :func:`.lm_head.default_chunk_size`.
        entropy: whether to compute it, and whether its gradient flows.
        fused: on CUDA, whether to use Triton's kernels (:mod:`.lm_head_kernels`).

    >>> hidden_NH, weight_VH = torch.eye(2), torch.tensor([[0.0, 0.0], [0.0, 9.0], [5.0, 5.0]])
    >>> targets_N = torch.tensor([0, 1])
    >>> logprob_N, entropy_N = token_logprobs(
    ...     hidden_NH, weight_VH, targets_N, temperature=1.0, vocab_size=2, group=None, entropy="value"
    ... )
    >>> logprob_N.exp(), entropy_N.exp()
    (tensor([0.5000, 0.9999]), tensor([2.0000, 1.0012]))
    """
    head = LMHead(temperature, vocab_size, group, main_grad_VH, chunk_size or default_chunk_size(weight_VH), entropy, fused)
    return LogProbs(*_TokenLogProbs.apply(hidden_NH, weight_VH, targets_N, head))


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, head: LMHead
    ) -> tuple[Tensor, Tensor | None]:
        logprob_N = hidden_NH.new_empty(len(hidden_NH), dtype=accurate(hidden_NH.dtype))
        log_sum_exp_N = torch.empty_like(logprob_N)
        entropy_N = None if head.entropy == "none" else torch.empty_like(logprob_N)
        for chunk in head.chunks(hidden_NH, weight_VH, targets_N):
            statistics = head.statistics(chunk)
            logprob_N[chunk.tokens] = statistics.logprob_C
            log_sum_exp_N[chunk.tokens] = statistics.log_sum_exp_C
            if entropy_N is not None and statistics.entropy_C is not None:
                entropy_N[chunk.tokens] = statistics.entropy_C
        ctx.head = head
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, log_sum_exp_N, entropy_N)
        if head.entropy == "value":
            ctx.mark_non_differentiable(entropy_N)
        return logprob_N, entropy_N

    @staticmethod
    def backward(
        ctx: Any, logprob_grad_N: Tensor, entropy_grad_N: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        head: LMHead = ctx.head
        hidden_NH, weight_VH, targets_N, log_sum_exp_N, entropy_N = ctx.saved_tensors
        gradients = HeadGradients(hidden_NH, weight_VH, head.main_grad_VH, *ctx.needs_input_grad[:2])
        of_each_token = [log_sum_exp_N, logprob_grad_N]
        if head.entropy == "gradient":
            of_each_token += [entropy_N, entropy_grad_N]
        for chunk in head.chunks(hidden_NH, weight_VH, targets_N):
            head.differentiate(chunk, *(each_N[chunk.tokens] for each_N in of_each_token))
            gradients.add(chunk)
            del chunk  # or the last one's memory would outlive the loop
        return gradients.hidden_grad_NH, gradients.weight_grad_VH(), None, None
