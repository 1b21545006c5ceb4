"""The steps through a vocabulary-parallel LM head, a chunk of tokens at a time.

    z = hidden · weightᵀ / temperature        p = softmax(z)
    logprob_n = z_{n, target_n} − logsumexp_v z_{n, v}
    entropy_n = − Σ_v p_{n, v} log p_{n, v}

and, with a and b the incoming gradients of a token's log-prob and entropy,

    dz_{n, v} = a_n·(1[v = target_n] − p_{n, v}) − b_n·p_{n, v}·(log p_{n, v} + entropy_n)

:mod:`nft_megatron.model.logprob` goes through the steps twice, :mod:`nft_megatron.model.token_loss` once:

    for chunk in head.chunks(hidden_NH, weight_VH, targets_N):
        statistics = head.statistics(chunk)
        head.differentiate(chunk, statistics.log_sum_exp_C, logprob_grad_C)
        gradients.add(chunk)

Logits have the dtype of the inputs, as the matrix product returns them. Everything after is in float32: on CUDA in two kernels
(:mod:`.lm_head_kernels`), else by torch's operators on blocks of rows. So peak memory beyond the inputs is the logits of one
chunk, a few blocks, and the weight's gradient in float32 unless it is added to an existing buffer.

Shapes: N loss tokens; C tokens of a chunk; B of them in a block; H hidden size; V rows of the weight on this rank. The padded
vocabulary is split into equal consecutive ranges, one per tensor-parallel rank in order, as in Megatron-Core; rows from
``vocab_size`` on are padding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Entropy = Literal["none", "value", "gradient"]

CHUNK_BYTES = 300 * 2**20
"""Default memory of a chunk's logits."""

MIN_CHUNK = 512
"""Tokens. Shorter chunks would spend their time accumulating the weight's gradient rather than computing it."""

BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Elements of a float32 temporary. On the CPU it stays in the cache and below the size at which glibc returns memory to the
kernel: with fresh pages a pass takes several times as long. A GPU needs kernels that outlast their launch."""

PADDING_LOGIT = -1e30
"""A logit of probability 0 that stays finite in float32 times any loss weight."""


class Statistics(NamedTuple):
    """Statistics of each token of a chunk over the vocabulary of all ranks; float32 (float64 for float64 inputs)."""

    logprob_C: Tensor
    log_sum_exp_C: Tensor
    entropy_C: Tensor | None


class Chunk(NamedTuple):
    """C tokens and this rank's part of their logits, in memory that the next chunk reuses."""

    tokens: slice
    logits_CV: Tensor
    target_row_C1: Tensor
    """Row of the target on this rank; 0 if another rank has it."""
    is_own_C1: Tensor
    """Whether this rank has the target."""

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some tokens of the chunk at a time: their slice, their logits, and as much memory in the dtype of reductions."""
        num_tokens = block_rows(self.logits_CV)
        scratch_BV = torch.empty_like(self.logits_CV[:num_tokens], dtype=accurate(self.logits_CV.dtype))
        for start in range(0, len(self.logits_CV), num_tokens):
            rows = slice(start, start + num_tokens)
            logits_BV = self.logits_CV[rows]
            yield rows, logits_BV, scratch_BV[: len(logits_BV)]


class LMHead(NamedTuple):
    """The constants of a call."""

    temperature: float
    vocab_size: int
    group: dist.ProcessGroup | None
    main_grad_VH: Tensor | None
    chunk_size: int
    entropy: Entropy
    fused: bool = True
    """On CUDA, go through the logits with Triton's kernels instead of torch's operators, if Triton is there."""

    def chunks(self, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Iterator[Chunk]:
        """Every chunk in turn."""
        assert self.temperature > 0, self.temperature
        num_tokens, num_rows = len(hidden_NH), len(weight_VH)
        first_row = 0 if self.group is None else self.group.rank() * num_rows
        num_real = max(0, self.vocab_size - first_row)
        row_N1 = (targets_N - first_row).unsqueeze(1)
        is_own_N1 = (row_N1 >= 0) & (row_N1 < num_rows)
        row_N1 = torch.where(is_own_N1, row_N1, 0)
        memory_CV = hidden_NH.new_empty(min(self.chunk_size, num_tokens), num_rows)
        for start in range(0, num_tokens, self.chunk_size):
            tokens = slice(start, min(start + self.chunk_size, num_tokens))
            logits_CV = memory_CV[: tokens.stop - start]
            torch.addmm(logits_CV, hidden_NH[tokens], weight_VH.t(), beta=0, alpha=1 / self.temperature, out=logits_CV)
            logits_CV[:, num_real:] = PADDING_LOGIT
            yield Chunk(tokens, logits_CV, row_N1[tokens], is_own_N1[tokens])

    def statistics(self, chunk: Chunk) -> Statistics:
        """A collective of ``group``, for the same chunk."""
        own_max_C, sum_C, target_C, weighted_C = self._local_sums(chunk)
        # Shift each rank's sums from its own maximum to that of all ranks. If a rank has only padding, the shift is about
        # −1e30 and the scale 0: multiplied in this order they stay finite.
        max_C = own_max_C.clone()
        _all_reduce(max_C, dist.ReduceOp.MAX, self.group)
        shift_C = own_max_C - max_C
        scale_C = shift_C.exp()
        totals_3C = torch.stack([scale_C * sum_C, target_C, scale_C * weighted_C + scale_C * shift_C * sum_C])
        _all_reduce(totals_3C, dist.ReduceOp.SUM, self.group)
        sum_C, target_C, weighted_C = totals_3C

        # ≤ 0 even in floating point: the target is no larger than the maximum, and the sum contains exp(0) = 1.
        log_sum_C = sum_C.log()
        logprob_C = (target_C - max_C) - log_sum_C
        entropy_C = None if self.entropy == "none" else (log_sum_C - weighted_C / sum_C).clamp(min=0)
        return Statistics(logprob_C, max_C + log_sum_C, entropy_C)

    def _local_sums(self, chunk: Chunk) -> Tensor:
        """[4, C] over this rank's logits: max z; Σ e^(z − max); z of the target, or 0; Σ e^(z − max)·(z − max), or 0."""
        if fused := self._kernels(chunk):
            return fused.local_sums(chunk.logits_CV, chunk.target_row_C1, chunk.is_own_C1)
        sums_4C = chunk.logits_CV.new_zeros(4, len(chunk.logits_CV), dtype=accurate(chunk.logits_CV.dtype))
        sums_4C[2] = torch.where(chunk.is_own_C1, chunk.logits_CV.gather(1, chunk.target_row_C1), 0).squeeze(1)
        for rows, logits_BV, shifted_BV in chunk.blocks():
            sums_4C[0, rows] = logits_BV.amax(1)
            torch.sub(logits_BV, sums_4C[0, rows, None], out=shifted_BV)
            exp_BV = shifted_BV.exp_() if self.entropy == "none" else shifted_BV.exp()
            sums_4C[1, rows] = exp_BV.sum(1)
            if self.entropy != "none":
                sums_4C[3, rows] = torch.linalg.vecdot(exp_BV, shifted_BV)
        return sums_4C

    def differentiate(
        self,
        chunk: Chunk,
        log_sum_exp_C: Tensor,
        logprob_grad_C: Tensor,
        entropy_C: Tensor | None = None,
        entropy_grad_C: Tensor | None = None,
    ) -> None:
        """Turn the chunk's logits into the gradient of hidden · weightᵀ, which is dz / temperature."""
        if fused := self._kernels(chunk):
            b_C = None if entropy_grad_C is None else entropy_grad_C / self.temperature
            targets = chunk.target_row_C1, chunk.is_own_C1
            fused.differentiate(chunk.logits_CV, *targets, log_sum_exp_C, logprob_grad_C / self.temperature, entropy_C, b_C)
            return
        a_C1 = (logprob_grad_C / self.temperature).unsqueeze(1)
        for rows, logits_BV, logp_BV in chunk.blocks():
            torch.sub(logits_BV, log_sum_exp_C[rows, None], out=logp_BV)
            if entropy_C is None or entropy_grad_C is None:
                grad_BV = logp_BV.exp_().mul_(-a_C1[rows])
            else:
                p_BV = logp_BV.exp()
                b_B1 = (entropy_grad_C[rows] / self.temperature).unsqueeze(1)
                grad_BV = logp_BV.add_(entropy_C[rows, None]).mul_(-b_B1).sub_(a_C1[rows]).mul_(p_BV)
            grad_BV.scatter_add_(1, chunk.target_row_C1[rows], a_C1[rows] * chunk.is_own_C1[rows])
            logits_BV.copy_(grad_BV)

    def _kernels(self, chunk: Chunk) -> ModuleType | None:
        logits_CV = chunk.logits_CV
        return kernels() if self.fused and logits_CV.is_cuda and logits_CV.dtype is not torch.float64 else None


@functools.cache
def kernels() -> ModuleType | None:
    """:mod:`.lm_head_kernels`, or None without Triton, which comes with torch's CUDA builds."""
    return import_module("nft_megatron.model.lm_head_kernels") if find_spec("triton") else None


class HeadGradients:
    """dHidden and dWeight, each only if needed, accumulated chunk by chunk."""

    def __init__(
        self, hidden_NH: Tensor, weight_VH: Tensor, main_grad_VH: Tensor | None, needs_hidden: bool, needs_weight: bool
    ) -> None:
        self.hidden_NH, self.weight_VH, self.main_grad_VH = hidden_NH, weight_VH, main_grad_VH
        self.hidden_grad_NH = torch.empty_like(hidden_NH) if needs_hidden else None
        self.total_VH = main_grad_VH if needs_weight else None
        if needs_weight and main_grad_VH is None:
            self.total_VH = torch.zeros_like(weight_VH, dtype=accurate(weight_VH.dtype))

    def add(self, chunk: Chunk) -> None:
        """Add ``chunk`` after :meth:`LMHead.differentiate`."""
        grad_CV, hidden_CH = chunk.logits_CV, self.hidden_NH[chunk.tokens]
        if self.hidden_grad_NH is not None:
            torch.matmul(grad_CV, self.weight_VH, out=self.hidden_grad_NH[chunk.tokens])
        if self.total_VH is not None:
            num_rows = block_rows(self.total_VH)
            for total_BH, grad_CB in zip(self.total_VH.split(num_rows), grad_CV.split(num_rows, dim=1), strict=True):
                total_BH += grad_CB.t() @ hidden_CH

    def weight_grad_VH(self) -> Tensor | None:
        """The gradients for autograd; if ``main_grad_VH`` already has the gradient, a zero without its own memory.

        For a parameter without ``grad``, autograd turns it into a real zero. By then the memory of the chunks is free again.
        """
        if self.total_VH is None:
            return None
        if self.main_grad_VH is not None:
            return self.weight_VH.new_zeros(()).expand_as(self.weight_VH)
        return self.total_VH.to(self.weight_VH.dtype)


def default_chunk_size(weight_VH: Tensor) -> int:
    """Tokens whose logits fill ``CHUNK_BYTES``, in multiples of ``MIN_CHUNK`` and at least that.

    >>> [default_chunk_size(torch.empty(151936 // tp, 1, dtype=torch.bfloat16)) for tp in (1, 2, 8)]
    [1024, 2048, 8192]
    """
    return max(1, CHUNK_BYTES // (len(weight_VH) * weight_VH.itemsize * MIN_CHUNK)) * MIN_CHUNK


def block_rows(matrix: Tensor) -> int:
    """How many rows make up ``BLOCK_ELEMENTS``; at least one."""
    return max(1, BLOCK_ELEMENTS[matrix.device.type] // matrix.shape[1])


def accurate(dtype: torch.dtype) -> torch.dtype:
    """The dtype of reductions: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> None:
    """All-reduce in place; a no-op for one rank."""
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
