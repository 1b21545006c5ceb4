"""The variables that CUDA, torch, Transformer Engine and NCCL read once, when a trainer first uses its GPU.

They follow from the configuration, so no launcher need know them. They must be set before anything touches the GPU: best before
torch is imported, as ``nft-megatron train`` does.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from nft_megatron.base.exported import EXPORTED
from nft_megatron.config.schema import Config

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The name that torch reads first, and its older one."""


def trainer_environment(config: Config) -> dict[str, str]:
    """The variables that ``config`` asks for.

    ``CUDA_DEVICE_MAX_CONNECTIONS``: with a single queue kernels begin in the order of their launch, on which the overlap of
    Megatron's tensor-parallel communication relies (Megatron-LM's validate_args; tensor_parallel/layers.py:512-600).
    """
    kernels, parallel = config.kernels, config.parallel
    variables = {ALLOCATOR[0]: kernels.allocator} if kernels.allocator else {}
    connections = kernels.device_connections
    if connections is None and parallel.tensor * parallel.context > 1 and not config.cluster.gpu.lower().startswith("b"):
        connections = 1
    if connections is not None:
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = str(connections)
    if kernels.deterministic:
        variables |= {
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Transformer Engine's attention; Megatron insists on it
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS on several streams (torch's notes on reproducibility)
            "NCCL_ALGO": "^NVLS",  # one of those that Megatron-LM's --deterministic-mode accepts: not in the switches
        }
    return variables


def export_environment(config: Config, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set :func:`trainer_environment` in ``environ``, except what is there already, and note what was set.

    vLLM's servers must not inherit it. A second call changes nothing.
    """
    set_before = environ.get(EXPORTED, "").split()
    new = [
        name
        for name in trainer_environment(config)
        if name not in environ and not (name in ALLOCATOR and any(other in environ for other in ALLOCATOR))
    ]
    environ.update({name: value for name, value in trainer_environment(config).items() if name in new})
    if new:
        environ[EXPORTED] = " ".join([*set_before, *new])


def overruled(config: Config, environ: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """The variables to which the environment gives another value than ``config`` asks for, with that value."""
    found = {}
    for name, wanted in trainer_environment(config).items():
        given = next((environ[key] for key in (ALLOCATOR if name in ALLOCATOR else (name,)) if key in environ), wanted)
        if given != wanted:
            found[name] = given
    return found
