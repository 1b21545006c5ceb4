"""How long new weights take to reach the engine on the configured path, and checkpoints and exports to reach the disk.

The rates of the host's part were measured on this project's two-core machine, in CPU seconds per GB; one thread each. A shared
file system has ``cluster.filesystem_gb_per_second`` for all nodes together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nft_megatron.config.schema import Config
from nft_megatron.plan.hardware import ACHIEVABLE, GB
from nft_megatron.plan.layouts import Cluster
from nft_megatron.plan.memory import ELEMENT
from nft_megatron.plan.servers import Servers
from nft_megatron.weights import ModelShape, num_parameters

WRITE_SECONDS, READ_SECONDS, HASH_SECONDS = 2.0, 0.65, 0.57
"""Per GB: rank 0's writer of weights and exports; a server's rank that reads all of them; their fingerprint, on each rank."""


@dataclass(frozen=True)
class Publish:
    """Seconds per step of each part; parts follow each other. ``path`` names the way in words."""

    path: str
    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def publish_time(config: Config, shape: ModelShape, cluster: Cluster, servers: Servers) -> Publish:
    """The weights' way from the trainers to every server, once per step."""
    size = 2.0 * num_parameters(shape)
    gigabytes = size / GB
    link = cluster.gpu.network_bandwidth * ACHIEVABLE.network
    gather = size / link if cluster.num_trainers > 1 else 0.0
    if not servers.overlaps:
        return Publish("in memory", {"gather": gather, "copy": 2 * size / servers.gpu.memory_bandwidth})
    in_memory = str(config.fleet.weights_dir or "").startswith("/dev/shm")
    disk = math.inf if in_memory else config.cluster.filesystem_gb_per_second * GB
    nodes = math.ceil(servers.num_gpus / cluster.gpus_per_node)
    write = max(gather, WRITE_SECONDS * gigabytes, size / disk)
    if config.fleet.weights == "folder":
        read = max(nodes * size / disk, (READ_SECONDS + HASH_SECONDS) * gigabytes)
        return Publish(f"files, read by {nodes} node{'s' * (nodes > 1)}", {"write": write, "read": read})
    parts = {"gather": gather, "send": size / link, "fingerprint": HASH_SECONDS * gigabytes}
    if config.fleet.keep_copy:
        parts["copy on disk"] = max(0.0, write - sum(parts.values()))
    return Publish("broadcast" + (" and a copy on disk (fleet.keep_copy)" if config.fleet.keep_copy else ""), parts)


def state_bytes(dtype_bytes: int) -> int:
    """Per parameter in a checkpoint besides the weights: the moments, and master weights if ``model.dtype`` is not float32."""
    return 8 if dtype_bytes == ELEMENT["float32"] else 12


def checkpoint_bytes(config: Config, shape: ModelShape) -> float:
    """Bytes of one checkpoint: weights, master weights and moments."""
    element = ELEMENT[config.model.dtype]
    return (element + state_bytes(element)) * num_parameters(shape)


def export_bytes(config: Config, shape: ModelShape) -> float:
    """Bytes of one Hugging Face export."""
    return ELEMENT[config.model.dtype] * num_parameters(shape)


def save_time(config: Config, shape: ModelShape, cluster: Cluster, copied: float) -> float:
    """Mean seconds per step that training waits for checkpoints and exports.

    Args:
        copied: bytes that a rank copies to host memory for a checkpoint.
    """
    disk = config.cluster.filesystem_gb_per_second * GB
    checkpoint = copied / (cluster.gpu.host_bandwidth * ACHIEVABLE.host)
    if not config.checkpoint.asynchronous:
        checkpoint += checkpoint_bytes(config, shape) / disk
    seconds = checkpoint / config.checkpoint.every
    if config.checkpoint.export_every:
        size = export_bytes(config, shape)
        seconds += max(WRITE_SECONDS * size / GB, size / disk) / config.checkpoint.export_every
    return seconds
