"""What the memory of a vLLM server holds: keys and values of how many tokens, and answers of how many requests at once.

Arithmetic without torch, so that ``plan`` computes with a GPU's published memory what the trainer computes with its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from nft_megatron.base.errors import UserError
from nft_megatron.weights import ModelShape, num_parameters

ENGINE_BYTES = 5e9
"""Assumed bytes per GPU besides weights, keys and values: context, workspaces, CUDA graphs, a prefill's activations."""

DEFAULT_SHARE = 0.9
"""vLLM's default of ``--gpu-memory-utilization``."""

_LARGE_GPU = 70 * 2**30
"""vLLM runs up to 1,024 requests at once on GPUs with this much memory, except A100s, and 256 on others (arg_utils.py)."""


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value that flags of vLLM give ``name``, in either of their spellings; the last one counts.

    >>> option(("--max-num-seqs", "64", "--gpu_memory_utilization=0.8"), "--gpu-memory-utilization")
    '0.8'
    """
    found = None
    for index, word in enumerate(arguments):
        flag, has_value, value = word.partition("=")
        if flag.replace("_", "-") == name:
            found = value if has_value else arguments[index + 1] if index + 1 < len(arguments) else None
    return found


def _number(arguments: Sequence[str], name: str, default: float) -> float:
    text = option(arguments, name)
    try:
        number = default if text is None else float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise UserError("fleet.arguments", f"{name}={text}", "is not a positive number", "correct it or leave it out")
    return number


def memory_share(arguments: Sequence[str]) -> float:
    """The share of a GPU's memory that a server takes."""
    return _number(arguments, "--gpu-memory-utilization", DEFAULT_SHARE)


def max_requests(arguments: Sequence[str], gpu_bytes: float, gpu: str = "") -> int:
    """The most answers that a server generates at once, however short they are."""
    is_large = gpu_bytes >= _LARGE_GPU and not gpu.lower().startswith("a100")
    return int(_number(arguments, "--max-num-seqs", 1024 if is_large else 256))


def key_value_bytes(shape: ModelShape, element: float, tensor_parallel: int = 1) -> float:
    """Bytes of a token's keys and values on all GPUs of a server; more GPUs than key-value heads hold copies of them."""
    return 2 * element * shape.num_layers * max(shape.num_query_groups, tensor_parallel) * shape.head_dim


def kv_tokens(shape: ModelShape, *, gpu_bytes: float, tensor_parallel: int, arguments: Sequence[str]) -> int:
    """Tokens whose keys and values a server on ``tensor_parallel`` GPUs of ``gpu_bytes`` each holds beside bfloat16 weights.

    0 if the weights alone do not fit. ``arguments``: the server's flags.
    """
    room = tensor_parallel * (memory_share(arguments) * gpu_bytes - ENGINE_BYTES) - 2.0 * num_parameters(shape)
    element = 1 if (option(arguments, "--kv-cache-dtype") or "").startswith("fp8") else 2
    return max(0, int(room / key_value_bytes(shape, element, tensor_parallel)))
