"""Stands in for nft_megatron/model/lm_head_kernels.py on the pretended GPU: its functions, written out in torch."""

import torch


def _check(logits, *of_each_token) -> None:
    """A kernel gets addresses: everything must be in the device's memory, row after row, and of the type that it reads."""
    assert logits.is_cuda and logits.is_contiguous()
    for each in of_each_token:
        assert each.is_cuda and each.numel() == len(logits) and (len(logits) < 2 or each.stride(0) == 1)


def local_sums(logits, target_row, is_own):
    _check(logits, target_row, is_own)
    assert (target_row.dtype, is_own.dtype) == (torch.int64, torch.bool)
    z = logits.float()
    largest = z.amax(1)
    shifted = z - largest[:, None]
    target = torch.where(is_own, z.gather(1, target_row), 0).squeeze(1)
    return torch.stack([largest, shifted.exp().sum(1), target, (shifted.exp() * shifted).sum(1)])


def differentiate(logits, target_row, is_own, log_sum_exp, logprob_grad, entropy, entropy_grad) -> None:
    of_each_token = [log_sum_exp, logprob_grad, *(x for x in (entropy, entropy_grad) if x is not None)]
    _check(logits, target_row, is_own, *of_each_token)
    assert {each.dtype for each in of_each_token} == {torch.float32}
    logp, factor = logits.float() - log_sum_exp[:, None], logprob_grad[:, None]
    if entropy_grad is not None:
        factor = factor + entropy_grad[:, None] * (logp + entropy[:, None])
    grad = -factor * logp.exp()
    grad.scatter_add_(1, target_row, logprob_grad[:, None] * is_own)
    logits.copy_(grad)
