"""Keeps a share of the optimizer's state in host memory between updates.

Master weights and moments are 12 bytes per parameter and are used once per update, when no activations are alive. So they stay
in pinned host memory and move to the device only for the update: two passes of the share over PCIe, against an update that
takes seconds. The arithmetic stays on the device and is bit-identical, and any Adam works, including the fused ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


class _Parameter:
    """One of the optimizer's parameters, this rank's shard of a weight, with host buffers for its tensors."""

    def __init__(self, optimizer: DistributedOptimizer, parameter: torch.nn.Parameter, pin: bool) -> None:
        self._optimizer = optimizer
        self._parameter = parameter
        masters = (master for group in optimizer.shard_fp32_from_float16_groups for master in group)
        self._has_master = any(parameter is master for master in masters)  # float32 models are trained in place
        self.host = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin) for name, tensor in self.tensors().items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's current tensors; a restored checkpoint replaces them."""
        state = self._optimizer.optimizer.state[self._parameter]
        moments = {name: state[name] for name in _MOMENTS}
        return moments | ({"master": self._parameter.data} if self._has_master else {})

    def put(self, tensors: dict[str, Tensor]) -> None:
        """Hand these tensors to the optimizer."""
        self._optimizer.optimizer.state[self._parameter].update({name: tensors[name] for name in _MOMENTS})
        if self._has_master:
            self._parameter.grad = None  # a view of the gradient buffer, on the old master's device; recreated
            self._parameter.data = tensors["master"]


class OffloadedState:
    """``share`` of the state of ``optimizers``, by size; parked on the host from the start. Moments must exist already."""

    def __init__(self, optimizers: Sequence[DistributedOptimizer], share: float, device: torch.device) -> None:
        self._device = device
        self._parameters: list[_Parameter] = []
        every = [(parameter, optimizer) for optimizer in optimizers for parameter in optimizer.optimizer.state]
        room = share * sum(parameter.numel() for parameter, _ in every)
        for parameter, optimizer in sorted(every, key=lambda pair: -pair[0].numel()):
            if parameter.numel() <= room:
                room -= parameter.numel()
                self._parameters.append(_Parameter(optimizer, parameter, pin=device.type == "cuda"))
        self.park()

    @property
    def num_bytes(self) -> int:
        """Bytes held on the host."""
        return sum(tensor.nbytes for parameter in self._parameters for tensor in parameter.host.values())

    def park(self) -> None:
        """Copy what is on the device to the host and free it there."""
        for parameter in self._parameters:
            for name, tensor in parameter.tensors().items():
                parameter.host[name].copy_(tensor, non_blocking=True)
        if self._parameters and self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # before the device's memory is released
        for parameter in self._parameters:
            parameter.put(parameter.host)

    def fetch(self) -> None:
        """Copy everything to the device."""
        for parameter in self._parameters:
            on_device = {name: torch.empty_like(host, device=self._device) for name, host in parameter.host.items()}
            for name, tensor in on_device.items():
                tensor.copy_(parameter.host[name], non_blocking=True)
            parameter.put(on_device)

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Keep the state on the device inside the block: for updates, and for code that reads or replaces it."""
        self.fetch()
        try:
            yield
        finally:
            self.park()
