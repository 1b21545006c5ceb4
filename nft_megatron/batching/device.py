"""From host memory to the device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` of host memory on ``device``.

    A copy from ordinary memory would make the host wait until the GPU has finished all that it was given before; one from
    pinned memory takes its turn on the stream. torch keeps the pinned memory until then.

    >>> to_device(torch.tensor([1, 2]), torch.device("cpu"))
    tensor([1, 2])
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
