"""The LM head through its Triton kernels, for tests/model/test_lm_head_kernels.py.

    TRITON_INTERPRET=1 python tests/lm_head_kernel_worker.py OUT       one rank, or each of two by torchrun's variables

In Triton's interpreter the kernels run on the CPU. The results go to ``OUT/<rank>.pt``.
"""

import os
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from lm_head_reference import problem
from logprob_worker import loss_of_one_pass, ours
from triton.runtime.interpreter import InterpreterBuilder

from nft_megatron.model import lm_head, lm_head_kernels

# 128 padded rows on two ranks: the second rank has only padding.
CASES = [
    (dtype, padded, entropy) for dtype in ("float32", "bfloat16") for padded in (64, 128) for entropy in ("value", "gradient")
]
TOKENS, ROWS = 2, 100


def main(folder: Path) -> None:
    group, rank = None, 0
    if "RANK" in os.environ:
        dist.init_process_group("gloo", init_method="env://")
        group, rank = dist.group.WORLD, dist.get_rank()
    with mock.patch.object(lm_head_kernels, "BLOCK", 32), _everywhere():
        results = [_result(dtype, padded, entropy, group, rank) for dtype, padded, entropy in CASES]
        extreme = ours(*problem(num_tokens=3, scale=1e6), 1.0) if group is None else None
        counted = {dtype: _traffic(dtype) for dtype in (torch.float32, torch.bfloat16)} if group is None else None
    torch.save({"results": results, "extreme": extreme, "traffic": counted}, folder / f"{rank}.pt")
    if group is not None:
        del group
        dist.destroy_process_group()


def _everywhere():
    """The kernels for what would be on CUDA."""

    def chosen(head, chunk):
        return lm_head_kernels if chunk.logits_CV.dtype is not torch.float64 else None

    return mock.patch.object(lm_head.LMHead, "_kernels", chosen)


def _result(dtype: str, padded: int, entropy: str, group, rank: int):
    hidden, weight, targets, upstream = problem(13, padded, getattr(torch, dtype))
    if group is not None:
        weight = weight.chunk(2)[rank]
    inputs = (hidden, weight, targets, upstream, 0.7)
    return ours(*inputs, group=group, entropy=entropy), loss_of_one_pass(*inputs, group=group)


def _traffic(dtype: torch.dtype) -> dict[str, float]:
    """Bytes per logit that the kernels load and store, counted where the interpreter does it."""
    num_bytes: Counter[str] = Counter()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting(kind: str, original):
        def access(builder, pointers, *rest):
            mask = rest[0 if kind == "load" else 1].data
            if mask.size > 1:  # else one number of a token
                num_bytes[kind] += int(mask.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
            return original(builder, pointers, *rest)

        return access

    logits = torch.randn(TOKENS, ROWS).to(dtype)
    targets = torch.zeros(TOKENS, 1, dtype=torch.int64), torch.ones(TOKENS, 1, dtype=torch.bool)
    of_each_token = torch.ones(TOKENS)
    found = {}
    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counting("load", load)),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counting("store", store)),
    ):
        lm_head_kernels.local_sums(logits, *targets)
        found["statistics"] = sum(num_bytes.values()) / logits.numel()
        num_bytes.clear()
        lm_head_kernels.differentiate(logits, *targets, *[of_each_token] * 4)
        found["differentiate"] = sum(num_bytes.values()) / logits.numel()
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
