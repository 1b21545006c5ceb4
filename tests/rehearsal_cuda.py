"""Puts the pretended GPU of rehearsal_device.py in place of torch.cuda, NCCL and the kernels that training calls.

Stand-ins, all in plain torch: gloo for NCCL (and for its collectives of unequal lengths); torch's variable-length attention,
written out in float32; ``torch.compile`` leaves functions as they are. The LM head's kernels are in rehearsal_head.py.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
import torch.distributed as dist
from rehearsal_device import DEVICE, GROUPS, KERNELS, DeviceTensor, on_device
from rehearsal_host import GENERATOR, HOST, count_sync


class Event:
    """Finished when the copies are that had begun when it was recorded."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._number = 0

    def record(self, *_: Any) -> None:
        self._number = HOST.number

    def wait(self, *_: Any) -> None:
        """Another stream waits, not the host."""

    def synchronize(self) -> None:
        HOST.finish_copies(self._number)

    def query(self) -> bool:
        return all(copy.number > self._number for copy in HOST.copies)

    def elapsed_time(self, _: Event) -> float:
        return 0.0


class Stream:
    """All streams are one: what needs an order between two of them is not rehearsed."""

    cuda_stream, device, stream_id = 0, DEVICE, 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        pass

    def wait_event(self, *_: Any) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        count_sync("synchronize")

    def query(self) -> bool:
        return not HOST.copies

    def is_capturing(self) -> bool:
        return False


@contextlib.contextmanager
def _stream(*_: Any) -> Iterator[None]:
    yield


def _moved(to: Any) -> Any:
    def moved(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """``to`` sees the wrapper's meta device, so what is there already must not be copied."""
        arguments = tuple(map(_device, arguments))
        options = {key: _device(value) for key, value in options.items()}
        given = (*arguments, *options.values())
        if on_device(self) and (DEVICE in given or not any(isinstance(each, torch.device) for each in given)):
            dtype = next((each for each in given if isinstance(each, torch.dtype)), self.dtype)
            copies = bool(options.get("copy"))
            return self if dtype is self.dtype and not copies else to(self, dtype, copy=copies)
        return to(self, *arguments, **options)

    return moved


def _device(value: Any) -> Any:
    """Names of devices as devices, with an index; other arguments as they are."""
    return DEVICE if _is_cuda(value) else torch.device(value) if isinstance(value, str) else value


def _is_cuda(value: Any) -> bool:
    return isinstance(value, str | torch.device) and torch.device(value).type == "cuda"


def _from_python(make: Any) -> Any:
    """``torch.tensor(…, device="cuda")`` makes a host tensor below the dispatcher and copies it."""

    def made(data: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        device = options.pop("device", None)
        numbers = _numbers(data)
        host = make(numbers, *arguments, **options)
        return host if device is None or not _is_cuda(device) else host.to(DEVICE)

    return made


def _numbers(data: Any) -> Any:
    if isinstance(data, list | tuple):
        return type(data)(_numbers(each) for each in data)
    return data.item() if isinstance(data, DeviceTensor) and data.dim() == 0 else data


def _pinned(pin: Any) -> Any:
    def pin_memory(self: torch.Tensor, *_: Any) -> torch.Tensor:
        return HOST.pin(self.detach().clone())

    return pin_memory


def _module_moved(to: Any) -> Any:
    def moved(self: torch.nn.Module, *arguments: Any, **options: Any) -> torch.nn.Module:
        """torch gives a parameter that moves new data. A wrapper is a new parameter, so its attributes move too."""
        before = dict(self.named_parameters())
        result = to(self, *arguments, **options)
        for name, parameter in self.named_parameters():
            if parameter is not before[name]:
                vars(parameter).update(vars(before[name]))
        return result

    return moved


def install() -> None:
    """For the rest of this process. Call it before Megatron's first use and work inside ``with Device()``."""
    generator = types.SimpleNamespace(
        manual_seed=GENERATOR.manual_seed, get_state=GENERATOR.get_state, set_state=GENERATOR.set_state
    )
    cuda = {
        "_lazy_init": lambda: None,
        "_lazy_call": lambda call, **_: call(),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: DEVICE,  # an index needs a torch that was built for an accelerator
        "set_device": lambda *_: None,
        "synchronize": lambda *_: count_sync("synchronize"),
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: types.SimpleNamespace(
            major=9, minor=0, total_memory=80 << 30, multi_processor_count=132
        ),
        "get_device_name": lambda *_: "a pretended GPU",
        "empty_cache": lambda: None,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "is_current_stream_capturing": lambda: False,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda *_: Stream(),
        "default_stream": lambda *_: Stream(),
        "stream": _stream,
        "get_rng_state": lambda *_, **__: GENERATOR.get_state(),
        "set_rng_state": lambda state, *_, **__: GENERATOR.set_state(state),
        "manual_seed": GENERATOR.manual_seed,
        "manual_seed_all": GENERATOR.manual_seed,
        "initial_seed": lambda: GENERATOR.seed,
        "default_generators": (generator,),
    }
    for name, value in cuda.items():
        setattr(torch.cuda, name, value)
    torch.accelerator.current_stream = torch.cuda.current_stream
    torch.cuda.random.get_rng_state, torch.cuda.random.set_rng_state = torch.cuda.get_rng_state, torch.cuda.set_rng_state
    torch.Tensor.to = _moved(torch.Tensor.to)  # type: ignore[method-assign]
    torch.nn.Module.to = _module_moved(torch.nn.Module.to)  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *_, **__: self.to(DEVICE)  # type: ignore[method-assign]
    torch.Tensor.pin_memory = _pinned(torch.Tensor.pin_memory)  # type: ignore[method-assign]
    torch.Tensor.is_pinned = lambda self, *_: HOST.is_pinned(self)  # type: ignore[method-assign]
    torch.tensor, torch.as_tensor = _from_python(torch.tensor), _from_python(torch.as_tensor)
    _use_gloo()
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda *_, **__: GENERATOR.get_state()
    random._set_cuda_rng_state = lambda state, *_, **__: GENERATOR.set_state(state)
    # What the CPU's adaptation does for gloo; NCCL has both (nft_megatron/model/cpu.py)
    from nft_megatron.model import cpu

    mappings = sys.modules["megatron.core.tensor_parallel.mappings"]
    uneven = cpu._View(dist, all_gather=cpu._all_gather, reduce_scatter=cpu._reduce_scatter)
    mappings.torch = cpu._View(torch, distributed=uneven)  # type: ignore[attr-defined]


def _use_gloo() -> None:
    init, new = dist.init_process_group, dist.new_group

    def init_process_group(backend: str | None = None, *arguments: Any, **options: Any) -> None:
        GROUPS.clear()
        init("gloo", *arguments, **options)
        GROUPS[dist.group.WORLD.group_name] = backend or "nccl"

    def new_group(*arguments: Any, **options: Any) -> Any:
        backend = options.pop("backend", None)
        options.pop("pg_options", None)
        group = new(*arguments, backend="gloo", **options)
        if isinstance(group, dist.ProcessGroup):
            GROUPS[group.group_name] = backend or "nccl"
        return group

    def object_device(group: Any = None) -> str:
        return "cpu" if GROUPS.get((group or dist.group.WORLD).group_name) == "gloo" else "cuda:0"

    dist.distributed_c10d._get_object_coll_device = object_device
    for module in (dist, dist.distributed_c10d):
        module.init_process_group, module.new_group = init_process_group, new_group  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------------------------------- kernels


def _scores(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Probabilities ``[heads, queries, keys]`` of causal attention counted from the last query and the last key."""
    scores = torch.einsum("qad,kad->aqk", query, key) * scale
    visible = torch.ones(len(query), len(key), dtype=torch.bool).tril(len(key) - len(query))
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def _ranges(starts: torch.Tensor) -> list[slice]:
    return list(itertools.starmap(slice, itertools.pairwise(starts.tolist())))


def _chunks(query: Any, key: Any, value: Any, starts_q: Any, starts_k: Any) -> Iterator[tuple[slice, slice, Any, Any, Any]]:
    groups = query.shape[1] // key.shape[1]
    for queries, keys in zip(_ranges(starts_q), _ranges(starts_k), strict=True):
        each = (x[keys].float().repeat_interleave(groups, 1) for x in (key, value))
        yield queries, keys, query[queries].float(), *each


def _varlen(
    query: Any, key: Any, value: Any, starts_q: Any, starts_k: Any, max_q: int, max_k: int, causal: bool, scale: float, *_: Any
) -> Any:
    assert query.dtype in (torch.bfloat16, torch.float16), f"FlashAttention has no kernel for {query.dtype}"
    assert causal and starts_q.dtype == starts_k.dtype == torch.int32
    for starts, longest in ((starts_q, max_q), (starts_k, max_k)):
        assert max(each.stop - each.start for each in _ranges(starts)) <= longest
    output = torch.zeros(query.shape)
    for queries, _, q, k, v in _chunks(query, key, value, starts_q, starts_k):
        output[queries] = torch.einsum("aqk,kad->qad", _scores(q, k, scale), v)
    return output.to(query.dtype), torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


def _varlen_backward(
    grad: Any, query: Any, key: Any, value: Any, output: Any, lse: Any, starts_q: Any, starts_k: Any, *rest: Any, **_: Any
) -> Any:
    scale = next(value for value in rest if isinstance(value, float))
    grads = [torch.zeros(x.shape) for x in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    for queries, keys, q, k, v in _chunks(query, key, value, starts_q, starts_k):
        p, g = _scores(q, k, scale), grad[queries].float()
        dp = torch.einsum("qad,kad->aqk", g, v)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        grads[0][queries] = torch.einsum("aqk,kad->qad", ds, k)
        grads[1][keys] += torch.einsum("aqk,qad->kad", ds, q).unflatten(1, (-1, groups)).sum(2)
        grads[2][keys] += torch.einsum("aqk,qad->kad", p, g).unflatten(1, (-1, groups)).sum(2)
    return tuple(x.to(grad.dtype) for x in grads)


KERNELS["_varlen_attn"] = _varlen
KERNELS["_varlen_attn_backward"] = _varlen_backward
KERNELS["_fused_sdp_choice"] = lambda *_, **__: 0  # the formula itself; real ones choose a kernel
