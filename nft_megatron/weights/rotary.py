"""The frequencies of rotary positions, from a model's shape.

    θ_i = rope_theta^(−2i/D),   i = 0 … D/2 − 1

"llama3" scaling keeps the high frequencies, divides the low ones by ``factor`` and interpolates linearly in between.
With λ_i = 2π/θ_i the wavelength in tokens and L the original maximum of positions:

    s_i = clamp((L/λ_i − low_freq_factor) / (high_freq_factor − low_freq_factor), 0, 1)
    θ_i ← (1 − s_i)·θ_i/factor + s_i·θ_i

Megatron's own scaling takes only the factor and fixes L = 8192 and the frequency factors 1 and 4
(rotary_pos_embedding.py:_apply_scaling).

Shapes: D head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nft_megatron.weights.shape import ModelShape


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """θ ``[D/2]`` in radians per token, float32 on the CPU: the angle of pair i at position p is p·θ_i.

    >>> from dataclasses import replace
    >>> from nft_megatron.weights.shape import SHAPE_EXAMPLE
    >>> inverse_frequencies(replace(SHAPE_EXAMPLE, head_dim=8, rope_theta=1e4))
    tensor([1.0000, 0.1000, 0.0100, 0.0010])
    """
    exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    theta = 1.0 / shape.rope_theta**exponent
    scaling = shape.rope_scaling
    if scaling is None:
        return theta
    turns = scaling.original_max_positions / (2 * math.pi / theta)
    s = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - s) * theta / scaling.factor + s * theta
