"""Builds a run's server settings and its fleet from its configuration."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from nft_megatron.config.places import weights_folder
from nft_megatron.config.schema import Config
from nft_megatron.rollout.fleet.capacity import key_value_bytes, kv_tokens
from nft_megatron.rollout.fleet.fleet import Fleet
from nft_megatron.rollout.fleet.registry import run_key
from nft_megatron.rollout.fleet.server import ServerSettings, check_installed
from nft_megatron.weights import ModelShape, read_shape


def server_settings(config: Config) -> ServerSettings:
    """How to start every server of the run, on this machine or another. Creates the run's key."""
    fleet, folder = config.fleet, config.run_dir.resolve() / "fleet"
    return ServerSettings(
        model_folder=config.model.path.resolve(),
        folder=folder,
        log_folder=config.run_dir.resolve() / "logs" / "fleet",
        api_key=run_key(folder),
        dtype=config.model.dtype,
        python=str(fleet.python or sys.executable),
        host=fleet.host,
        max_model_len=min(config.max_sequence_tokens, read_shape(config.model.path).max_positions),
        tensor_parallel=fleet.tensor_parallel,
        threads=fleet.threads,
        kv_cache_gib=fleet.kv_cache_gib,
        on_gpu=torch.cuda.is_available(),
        arguments=fleet.arguments,
    )


def open_fleet(config: Config, interrupted: Callable[[], str | None] = lambda: None) -> Fleet:
    """The run's fleet, started: its own servers are coming up, and it looks for others. ``interrupted`` ends waits for them.

    Raises ``UserError`` if servers are to be started without vLLM installed, or for a wrong field of ``fleet``.
    """
    if config.fleet.servers:
        check_installed(str(config.fleet.python or sys.executable))
    fleet = Fleet(config.fleet, server_settings(config), weights_folder(config), seed=config.seed, interrupted=interrupted)
    fleet.start()
    return fleet


def outstanding_tokens(config: Config, shape: ModelShape) -> int:
    """``fleet.outstanding_tokens``. If it is null, the tokens whose keys and values a server's memory holds, which is printed.

    Servers' GPUs are assumed to have as much memory as this process's; without a GPU, ``fleet.kv_cache_gib`` counts. At least
    one sequence of maximal length.
    """
    fleet = config.fleet
    if fleet.outstanding_tokens is not None:
        return fleet.outstanding_tokens
    if torch.cuda.is_available():
        gpu_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        source = f"{fleet.tensor_parallel} × {gpu_bytes / 1e9:.0f} GB"
        tokens = kv_tokens(shape, gpu_bytes=gpu_bytes, tensor_parallel=fleet.tensor_parallel, arguments=fleet.arguments)
    else:
        source = f"fleet.kv_cache_gib = {fleet.kv_cache_gib}"
        tokens = int(fleet.kv_cache_gib * 2**30 / key_value_bytes(shape, getattr(torch, config.model.dtype).itemsize))
    tokens = max(tokens, config.max_sequence_tokens)
    print(f"fleet.outstanding_tokens = {tokens:,}: a server's room for keys and values ({source})", file=sys.stderr, flush=True)
    return tokens
