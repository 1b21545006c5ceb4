"""Drawing tokens: one uniform number per (seed, token position), and the inverse of the cumulative distribution.

An answer's random numbers depend only on its own seed and token count, so batches, processes and order change nothing.
Shapes: B answers, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014), on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream_keys(seeds: list[int]) -> np.ndarray:
    """The start of each seed's stream, uint64 ``[B]``. Scrambled, so that neighbouring seeds give unrelated streams."""
    return _mix(_mix(np.array([seed & _MASK for seed in seeds], dtype=np.uint64) + _GOLDEN))


def uniforms(keys_B: np.ndarray, counts_B: np.ndarray) -> np.ndarray:
    """The numbers at positions ``counts_B`` of the streams ``keys_B``: float64 ``[B]`` in [0, 1), multiples of 2⁻⁵².

    >>> keys = stream_keys([1, 2])
    >>> bool(uniforms(keys, np.array([5, 0]))[0] == uniforms(keys[:1], np.array([5]))[0])
    True
    """
    bits = _mix(keys_B + (counts_B.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (bits >> np.uint64(12)) * 2.0**-52


def keep_top_p(logprobs_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Renormalise each row over its nucleus: the fewest of its likeliest tokens whose probabilities sum to ``top_p``.

    All other tokens become −inf. Ties keep the lower token id. Holtzman et al., 2020.
    """
    sorted_BV, order_BV = logprobs_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = sorted_BV.double().exp()
    outside_BV = probs_BV.cumsum(dim=-1) - probs_BV >= top_p
    outside_BV[:, 0] = False
    kept_BV = torch.empty_like(logprobs_BV).scatter_(-1, order_BV, sorted_BV.masked_fill(outside_BV, -torch.inf))
    return torch.log_softmax(kept_BV, dim=-1)


def draw(
    logits_BV: torch.Tensor, uniforms_B: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row. Returns the tokens (int64 ``[B]``) and their log-probs (float32 ``[B]``, ≤ 0).

    The log-probs are those of softmax(logits / temperature), over the nucleus if ``top_p`` < 1. Temperature 0 takes the
    likeliest token and returns its log-prob at temperature 1, since that of a certain choice is always 0. A row with a NaN or
    +inf logit gives the log-prob NaN.
    """
    if temperature == 0:
        logprobs_BV = torch.log_softmax(logits_BV.float(), dim=-1)
        tokens_B = logprobs_BV.argmax(dim=-1)
    else:
        logprobs_BV = torch.log_softmax(logits_BV.float() / temperature, dim=-1)
        if top_p < 1:
            logprobs_BV = keep_top_p(logprobs_BV, top_p)
        # In float64 a sum over 150,000 tokens is exact enough, and u·total < total because u ≤ 1 − 2⁻⁵². So an entry above
        # u·total exists, and the first one is a token of positive probability.
        cumulative_BV = logprobs_BV.exp().cumsum(dim=-1, dtype=torch.float64)
        threshold_B1 = uniforms_B[:, None] * cumulative_BV[:, -1:]
        tokens_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0]
        tokens_B.clamp_(max=logits_BV.shape[-1] - 1)  # for rows with NaN, whose log-probs are all NaN
    return tokens_B, logprobs_BV.gather(-1, tokens_B[:, None])[:, 0].clamp_(max=0)
