"""The element-wise passes of the LM head as two Triton kernels, for CUDA. Import it only where Triton is installed.

Each logit is read once for the sums of :meth:`.lm_head.LMHead.statistics`, and read and written once for its gradient: 6 bytes
of memory traffic a logit in bfloat16, where torch's operators, one pass each, move 48, and 64 with the entropy
(tests/model/test_lm_head_kernels.py counts both). Reductions are in float32. A program's result depends on its row of logits
alone, not on timing or on the other rows, so that log-probs are the same bits in every pass.

Formulas and shapes: :mod:`.lm_head`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits that a program holds at once: enough to keep memory busy, few enough for the registers of ``WARPS`` warps."""
WARPS = 8

_LOWEST = tl.constexpr(-1e30)
"""PADDING_LOGIT: for the columns beyond a row, and a maximum that has seen nothing. No −∞, as −∞ − −∞ and 0 · −∞ are NaN."""


@triton.jit
def sums_kernel(
    logits: tl.tensor,
    target_row: tl.tensor,
    is_own: tl.tensor,
    sums: tl.tensor,
    num_tokens: tl.tensor,
    num_rows: tl.tensor,
    block: tl.constexpr,
) -> None:
    """One token: ``sums`` [4, C] of :meth:`LMHead._local_sums`."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * num_rows
    largest, total, weighted = tl.full((), _LOWEST, tl.float32), tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    for start in range(0, num_rows, block):
        column = start + tl.arange(0, block)
        logit = tl.load(row + column, mask=column < num_rows, other=_LOWEST).to(tl.float32)
        before = largest
        largest = tl.maximum(before, tl.max(logit, 0))
        scale, shift = tl.exp(before - largest), before - largest
        shifted = logit - largest
        exp = tl.exp(shifted)
        weighted = scale * weighted + scale * shift * total + tl.sum(exp * shifted, 0)  # in this order −1e30 · 0 stays 0
        total = scale * total + tl.sum(exp, 0)
    target = tl.load(row + tl.load(target_row + token)).to(tl.float32)
    tl.store(sums + token, largest)
    tl.store(sums + num_tokens + token, total)
    tl.store(sums + 2 * num_tokens + token, tl.where(tl.load(is_own + token), target, 0.0))
    tl.store(sums + 3 * num_tokens + token, weighted)


@triton.jit
def gradient_kernel(
    logits: tl.tensor,
    target_row: tl.tensor,
    is_own: tl.tensor,
    log_sum_exp: tl.tensor,
    logprob_grad: tl.tensor,
    entropy: tl.tensor,
    entropy_grad: tl.tensor,
    num_rows: tl.tensor,
    with_entropy: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One block of one token: its logits become their gradient. Incoming gradients are those of :mod:`.lm_head`, over the
    temperature; those of the entropy are read only ``with_entropy``."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < num_rows
    place = logits + token * num_rows + column
    logp = tl.load(place, mask=inside, other=_LOWEST).to(tl.float32) - tl.load(log_sum_exp + token)
    a = tl.load(logprob_grad + token)
    factor = a
    if with_entropy:
        factor += tl.load(entropy_grad + token) * (logp + tl.load(entropy + token))
    grad = -factor * tl.exp(logp)
    is_target = (column == tl.load(target_row + token)) & tl.load(is_own + token)
    grad = tl.where(is_target, grad + a, grad)
    tl.store(place, grad.to(logits.dtype.element_ty), mask=inside)


def local_sums(logits_CV: Tensor, target_row_C1: Tensor, is_own_C1: Tensor) -> Tensor:
    """[4, C] over this rank's logits: max z; Σ e^(z − max); z of the target, or 0; Σ e^(z − max)·(z − max). float32."""
    num_tokens, num_rows = logits_CV.shape
    sums_4C = torch.empty(4, num_tokens, dtype=torch.float32, device=logits_CV.device)
    sums_kernel[(num_tokens,)](logits_CV, target_row_C1, is_own_C1, sums_4C, num_tokens, num_rows, block=BLOCK, num_warps=WARPS)
    return sums_4C


def differentiate(
    logits_CV: Tensor,
    target_row_C1: Tensor,
    is_own_C1: Tensor,
    log_sum_exp_C: Tensor,
    logprob_grad_C: Tensor,
    entropy_C: Tensor | None,
    entropy_grad_C: Tensor | None,
) -> None:
    """Turn logits into their gradient, in place."""
    num_tokens, num_rows = logits_CV.shape
    with_entropy = entropy_C is not None and entropy_grad_C is not None
    entropies = (entropy_C, entropy_grad_C) if with_entropy else (log_sum_exp_C, log_sum_exp_C)
    gradient_kernel[(num_tokens, triton.cdiv(num_rows, BLOCK))](
        logits_CV,
        target_row_C1,
        is_own_C1,
        log_sum_exp_C,
        logprob_grad_C,
        *entropies,
        num_rows,
        with_entropy=with_entropy,
        block=BLOCK,
        num_warps=WARPS,
    )
