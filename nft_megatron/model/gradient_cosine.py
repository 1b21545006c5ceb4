"""The angle between the gradients of right and of wrong answers, from gradients sharded over the ranks.

    cos(g₊, g₋) = ⟨g₊, g₋⟩ / (‖g₊‖·‖g₋‖)        g₊ + g₋ = g, the gradient of a mini-batch

g₊ needs a separate forward and backward pass over the mini-batch; g comes from the pass that trains; g₋ is their difference.
Each rank keeps its shard of g₊, as large as its shard of the optimizer's gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nft_megatron.model.megatron import gradients_for_norm
from nft_megatron.model.optimizer import PolicyOptimizer
from nft_megatron.model.topology import Topology


def gradient_shards(optimizer: PolicyOptimizer) -> list[Tensor]:
    """This rank's part of the gradient that a schedule left in the chunks, as float32 copies.

    Over all ranks every element of every parameter occurs once: what several ranks hold is included on only one of them.
    """
    with optimizer.state_on_device():
        optimizer.megatron.prepare_grads()
        return [
            gradient.clone() for megatron in optimizer.megatron.chained_optimizers for gradient in gradients_for_norm(megatron)
        ]


def gradient_cosine(positive: Sequence[Tensor], whole: Sequence[Tensor], topology: Topology) -> float:
    """cos(g₊, g − g₊) of all ranks' shards of g₊ and g; NaN if one part is zero."""
    sums = torch.zeros(3, dtype=torch.float64, device=topology.device)
    for right, both in zip(positive, whole, strict=True):
        wrong = both.double() - right.double()
        sums += torch.stack([(right * wrong).sum(), right.double().square().sum(), wrong.square().sum()])
    sums = sums.cpu()
    dist.all_reduce(sums, group=topology.host_group)
    product, squared_right, squared_wrong = sums.tolist()
    length = math.sqrt(squared_right * squared_wrong)
    return product / length if length else math.nan
