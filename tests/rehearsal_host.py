"""The host's side of the pretended GPU: what it waited for, its memory while copies are on their way, random generators.

See :mod:`rehearsal_device`, which has the rules.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch


class DeviceMismatch(RuntimeError):
    pass


class PageableCopy(RuntimeError):
    pass


class EarlyRead(RuntimeError):
    pass


class LateWrite(RuntimeError):
    pass


class WrongGenerator(RuntimeError):
    pass


FAULTS = (DeviceMismatch, PageableCopy, EarlyRead, LateWrite, WrongGenerator)


# ------------------------------------------------------------------------------------------------------ waits of the host


@dataclass(frozen=True)
class Sync:
    """Where the host waited: the nearest line of the project or of Megatron, and whether within the pipeline schedule."""

    what: str
    file: str
    line: int
    in_schedule: bool

    @property
    def is_ours(self) -> bool:
        return self.file.startswith("nft_megatron/")


SYNCS: Counter[Sync] = Counter()
_ROOTS = ("nft_megatron/", "megatron/core/")


def count_sync(what: str) -> None:
    frame, place, inside = sys._getframe(1), None, False
    while frame is not None:
        name = frame.f_code.co_filename
        if place is None:
            start = max(name.rfind(root) for root in _ROOTS)
            if start >= 0:
                place = (name[start:], frame.f_lineno)
        inside |= name.endswith("megatron/core/pipeline_parallel/schedules.py")
        frame = frame.f_back
    file, line = place or ("elsewhere", 0)
    SYNCS[Sync(what, file, line, inside)] += 1
    HOST.finish_copies()


# ------------------------------------------------------------------------------------------------------------ host memory


@dataclass
class _Copy:
    """To the host: ``target`` gets ``value`` when it is finished. From it: ``target`` must still be ``value`` then."""

    number: int
    target: torch.Tensor
    value: torch.Tensor
    to_host: bool


@dataclass
class HostMemory:
    """Which host memory is pinned, and the copies on their way, in order."""

    pinned: dict[int, Any] = field(default_factory=dict)  # storages, kept so that no address is used again
    copies: list[_Copy] = field(default_factory=list)
    number: int = 0

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.pinned[storage.data_ptr()] = storage
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.numel() == 0 or tensor.untyped_storage().data_ptr() in self.pinned

    def begin_copy(self, target: torch.Tensor, value: torch.Tensor, to_host: bool) -> None:
        if to_host:  # copies from this memory come before it on the stream
            for copy in [copy for copy in self.copies if not copy.to_host and _shares(copy.target, target)]:
                self._finish(copy)
        self.number += 1
        self.copies.append(_Copy(self.number, target, value.clone(), to_host))
        if to_host:
            target.fill_(_poison(target.dtype))

    def finish_copies(self, until: int | None = None) -> None:
        """What the device had been given up to ``until`` is done."""
        for copy in [copy for copy in self.copies if until is None or copy.number <= until]:
            self._finish(copy)

    def _finish(self, copy: _Copy) -> None:
        self.copies = [other for other in self.copies if other is not copy]
        if copy.to_host:
            copy.target.copy_(copy.value)
        elif not torch.equal(copy.target.nan_to_num(), copy.value.nan_to_num()):
            raise LateWrite(f"host memory {tuple(copy.target.shape)} changed before its copy to the device was finished")

    def arriving(self, tensor: torch.Tensor) -> _Copy | None:
        return next((copy for copy in self.copies if copy.to_host and _shares(copy.target, tensor)), None)


HOST = HostMemory()


def _shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype is torch.bool else torch.iinfo(dtype).max


# ---------------------------------------------------------------------------------------------------------- random numbers


class DeviceGenerator:
    """The device's generator: its state has 16 bytes (seed, offset), as CUDA's has, and a CPU's is refused."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.offset = seed, 0

    def manual_seed(self, seed: int) -> None:
        self.seed, self.offset = seed, 0

    def get_state(self) -> torch.Tensor:
        return torch.tensor([self.seed, self.offset], dtype=torch.int64).view(torch.uint8).clone()

    def set_state(self, state: torch.Tensor) -> None:
        if state.dtype is not torch.uint8 or state.numel() != 16:
            raise WrongGenerator(f"a state of {state.numel()} bytes is not one of a CUDA generator, which has 16")
        self.seed, self.offset = state.view(torch.int64).tolist()

    def draw(self, call: Any) -> Any:
        """What ``call`` returns, with random numbers of this generator."""
        self.offset += 4
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(self.seed * 1_000_003 + self.offset)
            return call()


GENERATOR = DeviceGenerator()
RANDOM = frozenset(
    ("bernoulli", "bernoulli_", "exponential_", "multinomial", "normal_", "rand", "randint", "randn", "randperm", "uniform_")
)
