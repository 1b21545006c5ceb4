"""Transformer Engine's layers on the pretended GPU: its own Python and Megatron-Core's, over stand-ins for its kernels.

Import this before anything of Megatron-Core. What runs is the engine's Python: its modules with their parameters and states,
FusedAdam, rotary positions. Where it would call a kernel, or a module would compute, a formula in torch stands in; what
Megatron passes to a module is bound to the signature of the module's own ``forward``. A kernel without a stand-in raises by its
name.
"""

from __future__ import annotations

import enum
import importlib.machinery
import inspect
import itertools
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rehearsal_device import CALLED, DeviceTensor, on_device
from rehearsal_host import DeviceMismatch
from torch.nn import functional

EXTENSION = "transformer_engine_torch"


# ------------------------------------------------------------------------------------------------- the extension's stand-ins


class _Kernel:
    """A name in the extension: what imports and signatures do with it works, a call says that it has no stand-in."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> _Kernel:
        if name.startswith("__"):
            raise AttributeError(name)
        child = _Kernel(f"{self._name}.{name}")
        setattr(self, name, child)
        return child

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{self._name} has no stand-in in {Path(__file__).name}")

    def __int__(self) -> int:
        return 0


def _host(value: Any) -> Any:
    """What a kernel reads: the numbers, without a wait of the host."""
    if isinstance(value, list | tuple):
        return type(value)(_host(each) for each in value)
    if isinstance(value, torch.Tensor):
        if not on_device(value):
            raise DeviceMismatch(f"a kernel of Transformer Engine was given a tensor {tuple(value.shape)} in host memory")
        return value.memory.detach()  # type: ignore[attr-defined]
    return value


def _kernel(compute: Callable[..., Any]) -> Callable[..., Any]:
    """``compute`` over host tensors as a kernel over device tensors. It knows nothing of autograd, as kernels do."""

    def call(*arguments: Any) -> Any:
        CALLED[compute.__name__.removeprefix("_")] += 1
        with torch.no_grad():
            result = compute(*map(_host, arguments))
        as_device = lambda value: DeviceTensor(value) if isinstance(value, torch.Tensor) else value  # noqa: E731
        return tuple(map(as_device, result)) if isinstance(result, tuple) else as_device(result)

    return call


def _rotate(
    sign: int, x: Any, freqs: Any, starts: Any, form: Any, interleaved: bool, cu: Any, cp_size: int, cp_rank: int
) -> Any:
    """Rotary positions of a pack; with context ranks, of this rank's early and late chunk of each sequence."""
    assert starts is None and not interleaved, "only Megatron's form for packs has a stand-in"
    bounds = (cu // cp_size).tolist()
    assert bounds[-1] == len(x), f"the pack ends at {bounds[-1]}, its tensor at {len(x)}"
    rotated = torch.empty_like(x)
    for start, end in itertools.pairwise(bounds):
        half, positions = (end - start) // 2, range(end - start)
        if cp_size > 1:
            late = (2 * cp_size - 1 - cp_rank) * half
            positions = [*range(cp_rank * half, (cp_rank + 1) * half), *range(late, late + half)]
        angles = freqs[list(positions)][:, 0]
        first, second = x[start:end].float().chunk(2, dim=-1)
        turned = torch.cat((-second, first), -1)
        rotated[start:end] = (x[start:end].float() * angles.cos() + sign * turned * angles.sin()).to(x.dtype)
    return rotated


def _fused_rope_forward(*arguments: Any) -> Any:
    return _rotate(1, *arguments)


def _fused_rope_backward(*arguments: Any) -> Any:
    return _rotate(-1, *arguments)


def _multi_tensor_l2norm(chunk: int, overflow: Any, lists: Any, per_tensor: bool = False) -> Any:
    return torch.stack([x.float().norm() for x in lists[0]]).norm()[None], None


def _multi_tensor_scale(chunk: int, overflow: Any, lists: Any, scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def _multi_tensor_adam(
    chunk: int, overflow: Any, lists: Any, lr: float, beta1: float, beta2: float, eps: float, step: int, mode: int, *rest: Any
) -> None:
    corrects, decay = rest
    assert mode == 1, "decoupled weight decay"
    of_first, of_second = (1 - beta1**step, 1 - beta2**step) if corrects else (1, 1)
    for grad, weight, first, second in zip(*lists, strict=True):
        first.lerp_(grad.float(), 1 - beta1)
        second.mul_(beta2).addcmul_(grad.float(), grad.float(), value=1 - beta2)
        change = (first.double() / of_first) / ((second.double() / of_second).sqrt() + eps) + decay * weight.double()
        weight.copy_(weight.double() - lr * change)


ENUMS = {
    "DType": ("kByte", "kInt32", "kFloat32", "kFloat16", "kBFloat16", "kFloat8E4M3", "kFloat8E5M2", "kFloat4E2M1"),
    "NVTE_Fused_Attn_Backend": ("NVTE_No_Backend", "NVTE_F16_arbitrary_seqlen", "NVTE_FP8"),
}
"""Those that the engine's Python compares with its own when it is imported."""
KERNELS = (_fused_rope_forward, _fused_rope_backward, _multi_tensor_l2norm, _multi_tensor_scale, _multi_tensor_adam)


def _extension() -> types.ModuleType:
    module = types.ModuleType(EXTENSION)
    module.__spec__ = importlib.machinery.ModuleSpec(EXTENSION, None)
    module.__file__ = __file__
    for name, values in ENUMS.items():
        setattr(module, name, enum.IntEnum(name, values, start=0))
    for kernel in KERNELS:
        setattr(module, kernel.__name__.removeprefix("_"), _kernel(kernel))

    def absent(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Kernel(f"{EXTENSION}.{name}")
        setattr(module, name, value)
        return value

    module.__getattr__ = absent  # type: ignore[method-assign]
    return module


os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its core library is not loaded
sys.modules[EXTENSION] = _extension()
import transformer_engine.common  # noqa: E402

transformer_engine.common.load_framework_extension = lambda *_: None
import transformer_engine.pytorch as engine  # noqa: E402
from transformer_engine.pytorch import cpp_extensions  # noqa: E402

# ------------------------------------------------------------------------------------------------------------------ modules


def _bound(name: str, original: Callable[..., Any], stand_in: Callable[..., Any]) -> Callable[..., Any]:
    """``stand_in``, given all arguments by name, as the original's signature has them."""
    signature = inspect.signature(original)

    def call(*arguments: Any, **options: Any) -> Any:
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        CALLED[name] += 1
        return stand_in(**bound.arguments)

    return call


class _Product(torch.autograd.Function):
    """x Wᵀ. Where the module fuses the accumulation, the weight's gradient is added to ``main_grad``, as by the engine."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, fuses: bool) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.fuses = weight, fuses
        return functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        of_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        if ctx.fuses:
            ctx.weight.main_grad.add_(of_weight)
            ctx.weight.grad_added_to_main_grad = True
            CALLED["gradient accumulation"] += 1
            of_weight = torch.zeros_like(weight) if getattr(ctx.weight, "zero_out_wgrad", False) else torch.empty_like(weight)
        return grad @ weight, of_weight, None


def _product(module: Any, x: Any) -> Any:
    """What a column- or row-parallel linear module gives, by Megatron's own collectives."""
    from megatron.core.tensor_parallel import mappings

    group, parallel = module.tp_group, module.tp_size > 1
    if parallel and module.parallel_mode == "column":
        gather = mappings.gather_from_sequence_parallel_region
        x = (gather if module.sequence_parallel else mappings.copy_to_tensor_model_parallel_region)(x, group=group)
    y = _Product.apply(x, module.weight, module.fuse_wgrad_accumulation)
    if parallel and module.parallel_mode == "row":
        reduce = mappings.reduce_from_tensor_model_parallel_region
        y = (mappings.reduce_scatter_to_sequence_parallel_region if module.sequence_parallel else reduce)(y, group=group)
    bias = module.bias if module.use_bias else None
    if module.return_bias:
        return y, bias if bias is not None else torch.Tensor()
    return y if bias is None else y + bias


def _norm(x: Any, weight: Any, epsilon: float) -> Any:
    return functional.rms_norm(x, weight.shape, weight, epsilon)


def _linear(self: Any, inp: Any, **_: Any) -> Any:
    return _product(self, inp)


def _layer_norm_linear(self: Any, inp: Any, **_: Any) -> Any:
    assert self.normalization == "RMSNorm" and not self.zero_centered_gamma
    return _product(self, _norm(inp, self.layer_norm_weight, self.eps))


def _rms_norm(self: Any, input: Any, *_: Any, **__: Any) -> Any:
    return _norm(input, self.weight, self.eps)


def _attention(self: Any, query_layer: Any, key_layer: Any, value_layer: Any, **others: Any) -> Any:
    """Causal attention within each sequence of a pack: the variable-length kernel over the project's chunks of context ranks.

    It insists on what the engine's kernels do: a dtype of 16 bits, bounds on the device as 32-bit numbers, the longest sequence
    as a number of the host, and sequences that divide evenly among context ranks.
    """
    from torch.nn.attention.varlen import varlen_attn

    from nft_megatron.model.attention import _ContextKeys, _grouped_heads
    from nft_megatron.model.packed_sequences import pack_sequences

    assert (others["qkv_format"], others["attn_mask_type"]) == ("thd", "padding_causal"), others
    assert query_layer.dim() == 3 and query_layer.dtype in (torch.bfloat16, torch.float16), (
        query_layer.shape,
        query_layer.dtype,
    )
    bounds = _host(others["cu_seqlens_q"])
    assert bounds.dtype == torch.int32 and isinstance(others["max_seqlen_q"], int)
    lengths = bounds.diff().tolist()
    size, rank = (1, 0) if self.cp_group is None else (self.cp_group.size(), self.cp_group.rank())
    assert max(lengths) <= others["max_seqlen_q"] and sum(lengths) == size * len(query_layer)
    assert size == 1 or all(length % (2 * size) == 0 for length in lengths), lengths
    packed = pack_sequences(lengths, query_layer.device, rank, size, "varlen")
    if size > 1:
        both = torch.cat((key_layer, value_layer), -1)
        key_layer, value_layer = _ContextKeys.apply(both, packed.key_index_K, self.cp_group).chunk(2, -1)
    starts = packed.chunk_starts_q, packed.chunk_starts_k
    options = {"scale": self.softmax_scale, "window_size": (-1, 0), **_grouped_heads()}
    return varlen_attn(query_layer, key_layer, value_layer, *starts, *packed.longest_chunk, **options).flatten(1)


def _general_gemm(A: Any, B: Any, out_dtype: Any, layout: str, **others: Any) -> Any:
    """What Megatron's router asks for. The engine reads its matrices by column, so that A comes second."""
    assert all(others[name] is None for name in ("out", "bias", "quantization_params")) and not others["accumulate"]
    a, b = (x.to(out_dtype or A.dtype) for x in (A, B))
    first, second = b.t() if layout[1] == "T" else b, a.t() if layout[0] == "T" else a
    return first @ second, None, None, None


for owner, attribute, stand_in in (
    (engine.LayerNormLinear, "forward", _layer_norm_linear),
    (engine.Linear, "forward", _linear),
    (engine.RMSNorm, "forward", _rms_norm),
    (engine.DotProductAttention, "forward", _attention),
    (cpp_extensions, "general_gemm", _general_gemm),
):
    name = owner.__name__ if attribute == "forward" else attribute
    setattr(owner, attribute, _bound(name, getattr(owner, attribute), stand_in))
