"""Log-probs of given tokens under a vocabulary-parallel LM head, without ever holding all logits.

    logprob_n = z_{n, target_n} − logsumexp_v z_{n, v}        z = hidden · weightᵀ / temperature

Logits exist for ``chunk_size`` tokens at a time, in the forward pass and again in the backward pass; in between only the
log-sum-exp of every token is kept. Peak memory above the inputs is a chunk of logits in float32 (half as much again for
bfloat16 inputs, twice as much with entropy) and, in the backward pass, the weight's gradient in float32.

Shapes: N loss tokens; C tokens of a chunk; H hidden size; V rows of the weight on this rank. The padded vocabulary is cut into
equal consecutive ranges, one a tensor-parallel rank in order, as Megatron-Core does; rows from ``vocab_size`` on are padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class LogProbs(NamedTuple):
    """``logprob_N`` ≤ 0, differentiable; ``entropy_N`` ≥ 0 of the same distribution, without gradient, or None. In nats."""

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
    chunk_size: int = 1024,
    with_entropy: bool = False,
) -> LogProbs:
    """log softmax(hidden · weightᵀ / temperature) at ``targets_N``, float32 (float64 for float64 inputs).

    Args:
        hidden_NH: the same on all ranks of ``group``. Its gradient is this rank's part of a sum over ``group``: the caller's
            copy or gather region reduces it.
        weight_VH: this rank's rows of the LM head; its gradient is complete, and zero for padding.
        targets_N: token ids < ``vocab_size``, the true size of the vocabulary. N may be 0.
        group: the tensor-parallel ranks; None where one rank holds all rows.
        chunk_size: tokens whose logits exist at a time.

    >>> hidden_NH, weight_VH = torch.eye(2), torch.tensor([[0.0, 0.0], [0.0, 9.0], [5.0, 5.0]])
    >>> token_logprobs(
    ...     hidden_NH, weight_VH, torch.tensor([0, 1]), temperature=1.0, vocab_size=2, group=None
    ... ).logprob_N.exp()
    tensor([0.5000, 0.9999])
    """
    assert temperature > 0, temperature
    head = _Head(temperature, vocab_size, group, chunk_size, with_entropy)
    return LogProbs(*_TokenLogProbs.apply(hidden_NH, weight_VH, targets_N, head))


class _Head(NamedTuple):
    """What is constant during a call."""

    temperature: float
    vocab_size: int
    group: dist.ProcessGroup | None
    chunk_size: int
    with_entropy: bool

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        return (slice(start, start + self.chunk_size) for start in range(0, num_tokens, self.chunk_size))

    def logits(self, hidden_CH: Tensor, weight_VH: Tensor) -> Tensor:
        """z of this rank's rows, at least float32; padding has the lowest finite number, so that it has probability 0."""
        logits_CV = torch.matmul(hidden_CH, weight_VH.t()).to(_accurate(hidden_CH.dtype)).div_(self.temperature)
        num_real = max(0, self.vocab_size - self.rank * len(weight_VH))
        logits_CV[:, num_real:] = torch.finfo(logits_CV.dtype).min
        return logits_CV

    def own_targets(self, targets_N: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """The targets' rows on this rank (row 0 where another rank has the target) and whether it has them; both [N, 1]."""
        local_N1 = (targets_N - self.rank * num_rows).unsqueeze(1)
        is_own_N1 = (local_N1 >= 0) & (local_N1 < num_rows)
        return torch.where(is_own_N1, local_N1, 0), is_own_N1

    def local_sums(self, hidden_CH: Tensor, weight_VH: Tensor, rows_C1: Tensor, is_own_C1: Tensor) -> Tensor:
        """[4, C] over this rank's rows: max z; Σ e^(z − max); z of the target, or 0; Σ e^(z − max)·(z − max), or 0."""
        logits_CV = self.logits(hidden_CH, weight_VH)
        target_C = torch.where(is_own_C1, logits_CV.gather(1, rows_C1), 0).squeeze(1)
        max_C = logits_CV.amax(1)
        logits_CV -= max_C[:, None]
        if not self.with_entropy:
            return torch.stack([max_C, logits_CV.exp_().sum(1), target_C, torch.zeros_like(max_C)])
        exp_CV = logits_CV.exp()
        return torch.stack([max_C, exp_CV.sum(1), target_C, torch.linalg.vecdot(exp_CV, logits_CV)])


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, head: _Head) -> tuple[Tensor, Tensor | None]:
        sums_4N = torch.empty(4, len(hidden_NH), dtype=_accurate(hidden_NH.dtype), device=hidden_NH.device)
        rows_N1, is_own_N1 = head.own_targets(targets_N, len(weight_VH))
        for chunk in head.chunks(len(hidden_NH)):
            sums_4N[:, chunk] = head.local_sums(hidden_NH[chunk], weight_VH, rows_N1[chunk], is_own_N1[chunk])
        own_max_N, sum_N, target_N, weighted_N = sums_4N

        # Shift each rank's sums from its own maximum to that of all ranks. Where a rank has nothing but padding the shift is
        # about −3e38 and the scale 0: multiplied in this order they stay finite.
        max_N = own_max_N.clone()
        _all_reduce(max_N, dist.ReduceOp.MAX, head.group)
        shift_N = own_max_N - max_N
        scale_N = shift_N.exp()
        totals_3N = torch.stack([scale_N * sum_N, target_N, scale_N * weighted_N + scale_N * shift_N * sum_N])
        _all_reduce(totals_3N, dist.ReduceOp.SUM, head.group)
        sum_N, target_N, weighted_N = totals_3N

        # ≤ 0 also in floating point: the target is no larger than the maximum, and the sum contains exp(0) = 1.
        log_sum_N = sum_N.log()
        logprob_N = (target_N - max_N) - log_sum_N
        ctx.head = head
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, max_N + log_sum_N)
        if not head.with_entropy:
            return logprob_N, None
        entropy_N = (log_sum_N - weighted_N / sum_N).clamp(min=0)
        ctx.mark_non_differentiable(entropy_N)
        return logprob_N, entropy_N

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor, _: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        """d logprob / dz_v = 1[v = target] − softmax(z)_v, from logits made again."""
        head: _Head = ctx.head
        hidden_NH, weight_VH, targets_N, lse_N = ctx.saved_tensors
        needs_hidden, needs_weight, *_rest = ctx.needs_input_grad
        hidden_grad_NH = torch.empty_like(hidden_NH) if needs_hidden else None
        weight_grad_VH = torch.zeros_like(weight_VH, dtype=lse_N.dtype) if needs_weight else None
        scale_N1 = (gradient_N / head.temperature).unsqueeze(1)
        rows_N1, is_own_N1 = head.own_targets(targets_N, len(weight_VH))
        for chunk in head.chunks(len(hidden_NH)):
            grad_CV = head.logits(hidden_NH[chunk], weight_VH).sub_(lse_N[chunk, None]).exp_().mul_(-scale_N1[chunk])
            grad_CV.scatter_add_(1, rows_N1[chunk], scale_N1[chunk] * is_own_N1[chunk])
            grad_CV = grad_CV.to(hidden_NH.dtype)
            if hidden_grad_NH is not None:
                torch.matmul(grad_CV, weight_VH, out=hidden_grad_NH[chunk])
            if weight_grad_VH is not None:
                _add_matmul(weight_grad_VH, grad_CV.t(), hidden_NH[chunk])
            del grad_CV  # before the next chunk's logits are made
        if weight_grad_VH is not None:
            weight_grad_VH = weight_grad_VH.to(weight_VH.dtype)
        return hidden_grad_NH, weight_grad_VH, None, None


def _accurate(dtype: torch.dtype) -> torch.dtype:
    """The dtype of reductions: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with the sum kept in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> None:
    """In place; nothing to do for one rank or an empty tensor."""
    if group is not None and group.size() > 1 and tensor.numel():
        dist.all_reduce(tensor, op=op, group=group)
