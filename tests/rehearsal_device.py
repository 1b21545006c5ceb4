"""A pretended GPU: tensors that say cuda:0 and hold CPU memory, under rules at least as strict as a real one's.

What it is for: every place where host and device meet. What it cannot show: kernels, their speed, memory, real concurrency.

    device and host tensors in one operation            DeviceMismatch, but for 0-dimensional host tensors, as in torch
    host tensors as an index of device tensors          DeviceMismatch: torch allows it, by a hidden copy that waits
    a copy "non_blocking" from or to ordinary memory    PageableCopy: torch allows it, and waits
    host memory read before its copy has arrived        EarlyRead; or, by what goes around torch, NaN or the largest integer
    host memory changed before its copy has left        LateWrite
    a host tensor in a collective of NCCL               DeviceMismatch, and so is a device tensor in one of gloo
    a generator of the other kind, or its state         WrongGenerator
    the host waits for the device                       counted in ``SYNCS`` with the place in the code

Copies without ``non_blocking`` wait in either direction (ATen's copy_kernel_cuda synchronises the stream), so they count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from rehearsal_host import GENERATOR, HOST, RANDOM, DeviceMismatch, EarlyRead, PageableCopy, WrongGenerator, count_sync
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
_META = torch.device("meta")


# ----------------------------------------------------------------------------------------------------------------- tensors


def on_device(value: Any) -> bool:
    return isinstance(value, DeviceTensor) and not value.is_parked


def _inner(value: Any) -> Any:
    return value.memory if isinstance(value, DeviceTensor) else value


def _map(change: Callable[[Any], Any], tree: Any) -> Any:
    """``change`` of every leaf of nested lists, tuples and dictionaries. torch's own pytree takes half of a rehearsal."""
    kind = type(tree)
    if kind is list or kind is tuple:
        return kind([_map(change, each) for each in tree])
    if kind is dict:
        return {key: _map(change, value) for key, value in tree.items()}
    return change(tree)


def _tensors(*trees: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for tree in trees:
        if isinstance(tree, torch.Tensor):
            found.append(tree)
        elif isinstance(tree, list | tuple):
            found += _tensors(*tree)
        elif isinstance(tree, dict):
            found += _tensors(*tree.values())
    return found


class DeviceTensor(torch.Tensor):
    """``memory`` is where the numbers are. ``is_parked``: a parameter whose ``data`` was replaced by a host tensor."""

    memory: torch.Tensor
    is_parked: bool

    @staticmethod
    def __new__(cls, memory: torch.Tensor) -> DeviceTensor:
        assert type(memory) is torch.Tensor and memory.device == CPU, (type(memory), memory.device)
        layout = {"strides": memory.stride(), "storage_offset": memory.storage_offset(), "dtype": memory.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, memory.size(), **layout, device=_META)
        tensor.memory, tensor.is_parked = memory, False
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})

    device = property(lambda self: CPU if self.is_parked else DEVICE)
    is_cuda = property(on_device)
    is_cpu = property(lambda self: self.is_parked)
    is_meta = property(lambda self: False)

    def get_device(self) -> int:
        return -1 if self.is_parked else 0

    def __repr__(self, **_: Any) -> str:
        return f"{type(self).__name__}({self.memory!r})"

    def untyped_storage(self) -> Any:
        return self.memory.untyped_storage()

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    def is_pinned(self, *_: Any) -> bool:
        return self.is_parked and HOST.is_pinned(self.memory)

    def pin_memory(self, *_: Any) -> torch.Tensor:
        raise RuntimeError("cannot pin a CUDA tensor: only dense CPU tensors can be pinned")

    def item(self) -> Any:
        if on_device(self):
            count_sync("item")
        return self.memory.detach().item()

    def tolist(self) -> Any:
        if on_device(self):
            count_sync("tolist")
        return self.memory.detach().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        if on_device(self):
            raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")
        return self.memory.detach().numpy()

    def type(self, *arguments: Any, **options: Any) -> Any:
        if arguments or options:
            return super().type(*arguments, **options)
        return self.memory.type() if self.is_parked else self.memory.type().replace("torch.", "torch.cuda.", 1)

    def record_stream(self, stream: Any) -> None:
        """Memory is freed when nobody has it: nothing to do."""

    def __deepcopy__(self, memo: Any) -> DeviceTensor:
        return DeviceTensor(self.memory.detach().clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a device tensor must not be pickled: copy it to host memory first")

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self.memory.detach() if self.is_parked else DeviceTensor(self.memory.detach())

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        self.is_parked = not on_device(value)
        self.memory = _inner(value).detach()
        if isinstance(value, DeviceTensor):
            with torch.no_grad():
                torch.Tensor.data.__set__(self, value.detach())  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------------- operations

_WAITS = frozenset(("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "_unique2", "unique_dim", "masked_select"))
_INDEXES = frozenset(("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"))
KERNELS: dict[str, Any] = {}
"""Kernels without a CPU form, by the operation's name: torch stand-ins that take and give host tensors."""
CALLED: Counter[str] = Counter()
"""How often each stand-in was called."""


class Device(TorchDispatchMode):
    """Inside, the pretended device is there. See the top of this file."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


def call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    space, name = func._schema.name.split("::")
    if space == "c10d":
        return _collective(func, name, args, kwargs)
    flat = _tensors(args, kwargs)
    here, there = [value for value in flat if on_device(value)], [value for value in flat if not on_device(value)]
    if name == "_to_copy" or name == "copy_":
        return _copy(func, name, args, kwargs)
    target = kwargs.get("device")
    makes_device = bool(here) if target is None else _names_device(target)
    for value in () if func.is_view else there:
        if HOST.copies and HOST.arriving(_inner(value)) is not None:
            raise EarlyRead(f"{func} reads {tuple(value.shape)} in host memory before its copy has arrived")
    if here and (bad := [tuple(value.shape) for value in there if value.dim() or name in _INDEXES]):
        raise DeviceMismatch(f"{func}: tensors on cuda:0 and, of shape {bad}, in host memory")
    if here and _waits(name, args, kwargs):
        count_sync(name)
    if makes_device and kwargs.get("generator") is not None:
        raise WrongGenerator(f"{name} on cuda:0 with a generator of the CPU")
    pins = kwargs.get("pin_memory")
    inner_args, inner = _map(_inner, (args, kwargs))
    inner = {key: value for key, value in inner.items() if key != "pin_memory"}
    if target is not None:
        inner["device"] = CPU
    kernel = KERNELS.get(name) or func
    if name in KERNELS:
        CALLED[name] += 1
    if makes_device and name in RANDOM:
        result = GENERATOR.draw(lambda: kernel(*inner_args, **inner))
    else:
        result = kernel(*inner_args, **inner)
    if not makes_device:
        return HOST.pin(result) if pins else _same(result, inner_args, args)
    return _wrap(result, inner_args, args, kwargs, inner)


def _names_device(target: Any) -> bool:
    """Code in C++ reads a wrapper's meta device and asks for more of it."""
    return torch.device(target).type in ("cuda", "meta")


def _same(result: Any, inner_args: Any, args: Any) -> Any:
    """An operation in place gives back the very tensor that it was given: a parked parameter, not its memory."""
    return args[0] if args and isinstance(args[0], DeviceTensor) and result is inner_args[0] else result


def _wrap(result: Any, inner_args: Any, args: Any, kwargs: Any, inner: Any) -> Any:
    if isinstance(result, torch.Tensor):
        if args and isinstance(args[0], DeviceTensor) and result is inner_args[0]:
            return args[0]
        if "out" in kwargs and result is inner["out"]:
            return kwargs["out"]
    return _map(lambda value: DeviceTensor(value) if isinstance(value, torch.Tensor) else value, result)


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    """Whether the host must learn a number from the device: how many places of a mask are true, how long a result is."""
    if name in _INDEXES:
        has_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        is_fill = "put" in name and args[2].numel() == 1  # ATen's canDispatchToMaskedFill
        return has_mask and not is_fill
    return name in _WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None)


def _copy(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """``_to_copy(source, device=…)`` and ``copy_(target, source)``: the only way between host and device."""
    is_new = name == "_to_copy"
    source = args[0] if is_new else args[1]
    non_blocking = kwargs.get("non_blocking") or (not is_new and len(args) > 2 and args[2])
    wanted = kwargs.get("device")
    to_device = (on_device(source) if wanted is None else _names_device(wanted)) if is_new else on_device(args[0])
    crosses = on_device(source) != to_device and _inner(source).numel() > 0
    memory = _inner(source)
    early = HOST.arriving(memory) if HOST.copies and not on_device(source) else None
    if early is not None and not (crosses and non_blocking):  # on the device's own stream the copies take their turn
        raise EarlyRead(f"{func} reads {tuple(memory.shape)} in host memory before its copy has arrived")
    if early is not None:
        HOST.finish_copies(early.number)
    target = None if is_new else _inner(args[0])
    if crosses and non_blocking:
        host = memory if to_device else target
        if host is not None and not HOST.is_pinned(host):
            raise PageableCopy(f"{func} {tuple(memory.shape)} is to be non_blocking, but the host's memory is not pinned")
    elif crosses:
        count_sync("copy to the device" if to_device else "copy to the host")
    options = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking", "pin_memory")}
    result = func(memory, **options) if is_new else target.copy_(memory)
    if crosses and non_blocking and to_device:
        HOST.begin_copy(memory, memory, to_host=False)
    elif crosses and non_blocking:
        HOST.begin_copy(HOST.pin(result) if is_new else result, result.clone(), to_host=True)
    if not is_new:
        return args[0]
    return DeviceTensor(result) if to_device else result


# ------------------------------------------------------------------------------------------------------------ collectives

GROUPS: dict[str, str] = {}
"""The backend that each process group was created with, by the group's name; all of them are gloo's underneath."""


def _collective(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    flat = _tensors(args, kwargs)
    objects = [value for value in args if isinstance(value, torch.ScriptObject)]
    group = next((value for value in objects if "ProcessGroup" in str(value._type())), None)
    if group is not None and flat:
        backend = GROUPS.get(torch.distributed.ProcessGroup.unbox(group).group_name, "nccl")
        if wrong := [tuple(value.shape) for value in flat if on_device(value) != (backend == "nccl")]:
            place = "in host memory" if backend == "nccl" else "on cuda:0"
            raise DeviceMismatch(f"{func} of {backend} with tensors {place}, of shape {wrong}")
    inner_args, inner_kwargs = _map(_inner, (args, kwargs))
    return func(*inner_args, **inner_kwargs)
