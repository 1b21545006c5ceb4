"""What lets Megatron-Core run without a GPU. All such knowledge is in this file.

Megatron's modules use ``torch.cuda.current_device()`` and ``device="cuda"`` freely. Here each of them gets, in place of its
global name ``torch``, a view of torch whose accelerator is the CPU. torch itself is unchanged, so nothing else in the process
(Transformers' ``torch.device("meta")``, ``torch.cuda.is_available()``) notices, and no operation gets slower.
Only ``Tensor.cuda``, ``Module.cuda`` and ``Tensor.type`` are methods of torch's own classes and have to be replaced there.

Files and lines are those of megatron-core 0.16.1; 0.19 needs the same.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

CPU = torch.device("cpu")

# The packages that training uses. A module that is imported after `adapt_to_cpu` keeps the real torch.
_PACKAGES = (
    "megatron.core.dist_checkpointing.serialization",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",  # 0.19 imports it when it first saves
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.random",
)


class _Stream(torch.cpu.Stream):
    """torch's own CPU stream records no event; transformer/moe/token_dispatcher.py:895 waits for one."""

    def record_event(self) -> torch.cpu.Event:  # type: ignore[override]
        return torch.cpu.Event()


class _View(types.ModuleType):
    """A module with its own attributes first and those of ``base`` otherwise."""

    def __init__(self, base: types.ModuleType, **own: Any) -> None:
        super().__init__(base.__name__)
        self.__dict__.update(own, _base=base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``factory`` with ``device="cuda"`` read as the CPU."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if isinstance(kwargs.get("device"), str):  # the only string that Megatron passes is "cuda"
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return create


def _torch_on_cpu() -> types.ModuleType:
    cuda = _View(
        torch.cuda,
        # tensor_parallel/layers.py:552, pipeline_parallel/p2p_communication.py:190, distributed/param_and_grad_buffer.py:783
        current_device=lambda: CPU,
        # pipeline_parallel/p2p_communication.py:242, dist_checkpointing/strategies/filesystem_async.py:230
        synchronize=lambda *_: None,
        # transformer/moe/token_dispatcher.py:445 and 871-895
        Stream=_Stream,
        current_stream=torch.cpu.current_stream,
        stream=torch.cpu.stream,
        # tensor_parallel/random.py:235-238: the accelerator's generator is the CPU's
        get_rng_state=lambda *_: torch.get_rng_state(),
        set_rng_state=lambda state, *_: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
    )
    factories = {
        # pipeline_parallel/schedules.py:596, optimizer/optimizer.py:473, optimizer/clip_grads.py:90, exchange_utils.py:104
        name: _on_cpu(getattr(torch, name))
        for name in ("tensor", "zeros", "ones", "empty", "empty_like")
    }
    return _View(torch, cuda=cuda, **factories)


def _type_as_on_cuda(tensor_type: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.type()`` with the CUDA name: optimizer/distrib_optimizer.py:361-433 and clip_grads.py:167 compare the text."""

    @functools.wraps(tensor_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return tensor_type(self, *args, **kwargs)
        return str(tensor_type(self)).replace("torch.", "torch.cuda.", 1)

    return type_


def _all_gather(outputs: list[torch.Tensor], tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    """``all_gather`` of unequal lengths, which gloo refuses, as an all-to-all of copies."""
    lengths = [len(output) for output in outputs]
    gathered = tensor.new_empty(sum(lengths), *tensor.shape[1:])
    copies = torch.cat([tensor] * len(outputs))
    dist.all_to_all_single(gathered, copies, lengths, [len(tensor)] * len(outputs), group=group)
    for output, part in zip(outputs, gathered.split(lengths), strict=True):
        output.copy_(part)


def _reduce_scatter(output: torch.Tensor, inputs: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    """``reduce_scatter`` of unequal lengths, which gloo refuses: every rank gets the parts of its own result and sums them."""
    parts = output.new_empty(len(inputs), *output.shape)
    lengths = [len(each) for each in inputs]
    dist.all_to_all_single(parts.flatten(0, 1), torch.cat(inputs), [len(output)] * len(inputs), lengths, group=group)
    torch.sum(parts, 0, out=output)


def _as_numbers(value: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """``maybe_move_tensor_to_cpu``, which converts only tensors from a GPU to numbers."""
    return value.numpy() if as_numpy and isinstance(value, torch.Tensor) else value


@functools.cache
def adapt_to_cpu() -> None:
    """Make Megatron-Core in this process compute on the CPU. Call it before any use of Megatron, and only without CUDA.

    A second call does nothing.
    """
    assert not torch.cuda.is_available(), "Megatron-Core needs no adaptation if CUDA is available"
    for name in _PACKAGES:
        importlib.import_module(name)
    view = _torch_on_cpu()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and vars(module).get("torch") is torch:
            module.torch = view  # type: ignore[attr-defined]

    random = sys.modules["megatron.core.tensor_parallel.random"]
    # tensor_parallel/random.py:43-105 reaches into torch.cuda.default_generators, which is empty without CUDA.
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()  # type: ignore[attr-defined]
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)  # type: ignore[attr-defined]

    # tensor_parallel/mappings.py:150 and 199: the tensor ranks of an expert hold different numbers of tokens
    uneven = _View(torch.distributed, all_gather=_all_gather, reduce_scatter=_reduce_scatter)
    sys.modules["megatron.core.tensor_parallel.mappings"].torch = _View(view, distributed=uneven)  # type: ignore[attr-defined]

    # transformer/moe/moe_utils.py:1093: all_to_all_single takes no tensors for lengths
    dispatcher = sys.modules["megatron.core.transformer.moe.token_dispatcher"]
    dispatcher.maybe_move_tensor_to_cpu = _as_numbers  # type: ignore[attr-defined]

    # models/common/language_module/language_module.py:244, dist_checkpointing/exchange_utils.py:336
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.Tensor.type = _type_as_on_cuda(torch.Tensor.type)  # type: ignore[method-assign]
