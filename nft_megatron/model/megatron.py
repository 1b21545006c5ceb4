"""Where the supported versions of Megatron-Core, 0.16.1 to 0.19, differ: one switch each, by what is there, not by number.

Everything else in this package is the same call on every version. What 0.19 announces for later, and what will be done then:

- ``common.pt``. 0.19 still reads it but writes its content as a sharded object, ``common_state``. Our checkpoints keep the
  file, which both ends read; a version that stops reading it needs that object written beside it.
- Its own asynchronous save gives way to nvidia-resiliency-ext. Neither is used (see :mod:`.checkpoint`).
- ``GPTModel`` gives way to ``HybridModel``. Its layer specs, embedding, head and checkpoint names are the same, so
  :class:`.policy.PolicyModel` would change its base class.
- ``DistributedDataParallel`` wants ``full_param_layout`` from its caller, and lays its buffers out itself as long as it may.
"""

from __future__ import annotations

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def gradients_for_norm(optimizer: DistributedOptimizer) -> list[Tensor]:
    """This rank's shards of the gradient, each parameter on one of the ranks that hold it. Renamed in 0.17."""
    if hasattr(optimizer, "get_grads_for_grad_norm"):
        return optimizer.get_grads_for_grad_norm()
    return optimizer.get_main_grads_for_grad_norm()
