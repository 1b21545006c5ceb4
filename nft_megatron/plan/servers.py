"""Where the configured engine generates: which GPUs, how many servers, and how many answers each of them holds at once.

A trainer fills its GPU, so a vLLM server needs others: those of ``cluster.rollout_nodes``, those that ``fleet.devices`` names
beside the trainers' (whose numbers are below ``cluster.gpus_per_node``), or somebody else's at ``fleet.urls``. The embedded
engine decodes on the CPU cores of rank 0's node.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nft_megatron.base.errors import UserError
from nft_megatron.config.schema import Config
from nft_megatron.plan.hardware import Accelerator, accelerator
from nft_megatron.plan.layouts import Cluster
from nft_megatron.plan.memory import ELEMENT
from nft_megatron.rollout.fleet.capacity import key_value_bytes, kv_tokens, max_requests
from nft_megatron.weights import ModelShape

CORES = 16
"""Assumed processes of the embedded engine if ``rollout.processes`` is null, which means one per core of rank 0's node."""


@dataclass(frozen=True)
class Servers:
    """``num`` servers on ``gpus`` GPUs each.

    kv_tokens: tokens whose keys and values a server's memory holds. outstanding: tokens of prompts and expected answers that it
    is given at a time. max_running: answers at once. overlaps: whether it can generate while the trainers train.
    """

    gpu: Accelerator
    num: int
    gpus: int
    kv_tokens: int
    outstanding: int
    max_running: int
    overlaps: bool = True

    @property
    def num_gpus(self) -> int:
        return self.num * self.gpus


def servers_of(config: Config, shape: ModelShape, cluster: Cluster) -> Servers:
    """The servers of ``config``.

    Raises:
        UserError: if they cannot run beside the trainers, or have no room for a sequence of maximal length.
    """
    if config.rollout.engine == "embedded":
        return _embedded(config, cluster)
    fleet, gpu = config.fleet, cluster.gpu
    num = _num_servers(config, cluster)
    if shape.num_attention_heads % fleet.tensor_parallel:
        problem = f"does not divide the model's {shape.num_attention_heads} attention heads"
        raise UserError("fleet.tensor_parallel", fleet.tensor_parallel, problem, "choose a divisor")
    if fleet.min_servers > num:
        raise UserError(
            "fleet.min_servers",
            fleet.min_servers,
            f"the run would wait for servers that it does not have: there are {num}",
            f"lower it to at most {num}, or add rollout nodes",
        )
    tokens = _kv_tokens(config, shape, gpu, fleet.tensor_parallel)
    if tokens < config.max_sequence_tokens:
        raise UserError(
            "fleet.tensor_parallel",
            fleet.tensor_parallel,
            f"the keys and values of a sequence may take {config.max_sequence_tokens:,} tokens, and {fleet.tensor_parallel} "
            f"{gpu.name} have room for {tokens:,} beside the weights",
            "raise it, or use GPUs with more memory",
        )
    return Servers(
        gpu=gpu,
        num=num,
        gpus=fleet.tensor_parallel,
        kv_tokens=tokens,
        outstanding=fleet.outstanding_tokens or tokens,
        max_running=max_requests(fleet.arguments, gpu.memory, gpu.name),
    )


def with_tensor_parallel(servers: Servers, config: Config, shape: ModelShape, size: int) -> Servers | None:
    """The same GPUs as servers of ``size`` GPUs each; None if that is impossible."""
    tokens = _kv_tokens(config, shape, servers.gpu, size)
    if servers.num_gpus % size or shape.num_attention_heads % size or tokens < config.max_sequence_tokens:
        return None
    outstanding = config.fleet.outstanding_tokens or tokens
    return replace(servers, num=servers.num_gpus // size, gpus=size, kv_tokens=tokens, outstanding=outstanding)


def _kv_tokens(config: Config, shape: ModelShape, gpu: Accelerator, tensor_parallel: int) -> int:
    """As ``rollout.fleet.settings.outstanding_tokens`` computes it on the machine itself."""
    fleet = config.fleet
    if gpu.is_gpu:
        return kv_tokens(shape, gpu_bytes=gpu.memory, tensor_parallel=tensor_parallel, arguments=fleet.arguments)
    return int(fleet.kv_cache_gib * 2**30 / key_value_bytes(shape, ELEMENT[config.model.dtype]))


def _num_servers(config: Config, cluster: Cluster) -> int:
    fleet, per_node = config.fleet, cluster.gpus_per_node
    if cluster.num_rollout:
        if fleet.tensor_parallel > per_node:
            problem = f"a server's GPUs are in one node, which has {per_node}"
            raise UserError("fleet.tensor_parallel", fleet.tensor_parallel, problem, f"use at most {per_node}")
        return cluster.num_rollout // per_node * (per_node // fleet.tensor_parallel)
    if fleet.urls:
        return len(fleet.urls)
    if fleet.servers and (not cluster.gpu.is_gpu or _others_gpus(config, cluster)):
        return fleet.servers
    raise UserError(
        "cluster.rollout_nodes",
        config.cluster.rollout_nodes,
        f"the trainers fill all {cluster.num_trainers} GPUs, and a vLLM server cannot share one with a trainer",
        "give the servers nodes of their own (cluster.rollout_nodes=1), GPUs that no trainer uses (fleet.servers and "
        "fleet.devices, with cluster.gpus_per_node = the trainers per node), or name others' in fleet.urls; if servers of "
        "other jobs join the run, plan with as many rollout nodes",
    )


def _others_gpus(config: Config, cluster: Cluster) -> bool:
    """Whether ``fleet.devices`` names a place for every server, outside the GPUs of the trainers on rank 0's node."""
    devices = config.fleet.devices
    numbers = {number.strip() for device in devices for number in device.split(",")}
    return len(devices) >= config.fleet.servers and not numbers & {str(index) for index in range(cluster.gpus_per_node)}


def _embedded(config: Config, cluster: Cluster) -> Servers:
    if cluster.num_rollout:
        raise UserError(
            "cluster.rollout_nodes",
            config.cluster.rollout_nodes,
            "the embedded engine runs next to the trainer, so these nodes would do nothing",
            "set rollout.engine=vllm, or cluster.rollout_nodes=0",
        )
    processes = CORES if config.rollout.processes is None else max(1, config.rollout.processes)
    unbounded = 2**62  # host memory, which storage.py checks
    return Servers(accelerator("cpu"), processes, 1, unbounded, unbounded, config.rollout.batch_size, overlaps=False)
