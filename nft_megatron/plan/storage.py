"""Host memory of a node, and disk of a run."""

from __future__ import annotations

from dataclasses import dataclass

from nft_megatron.base.errors import UserError
from nft_megatron.config.schema import Config
from nft_megatron.plan.hardware import GB
from nft_megatron.plan.layouts import Cluster
from nft_megatron.plan.memory import StageMemory
from nft_megatron.plan.publish import checkpoint_bytes, export_bytes, state_bytes
from nft_megatron.plan.servers import Servers
from nft_megatron.plan.workload import Workload
from nft_megatron.weights import ModelShape, num_parameters

LEDGER_BYTES = 9.8
"""Per token in a ledger: ids, log-probs and text, compressed. Measured: 8,192 answers of 5,000 tokens take 401 MB."""

PROCESS_BYTES = {True: 6e9, False: 1e9}
"""Assumed host memory of a trainer's or a server's process, on GPUs and without."""

TOKEN_BYTES = 150
"""Assumed host memory per token of a step's answers on rank 0, including the text."""

KEPT_VERSIONS = 3
"""Most versions of the weights on disk at once: the two newest, and the one being written."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes on the fullest node that trains, by component, and on one that only generates (0 without such nodes).

    ``copy``: of one rank, for a checkpoint. ``checkpoint``: of all ranks of the node.
    """

    copy: float
    processes: float
    checkpoint: float
    offloaded: float
    answers: float
    engine: float
    rollout_node: float

    @property
    def trainer_node(self) -> float:
        return self.processes + self.checkpoint + self.offloaded + self.answers + self.engine


@dataclass(frozen=True)
class Disk:
    """Bytes in the run folder: of one step's ledger, all checkpoints and all versions of the weights that are kept, one export.

    ``per_100_steps``: what 100 steps add. Ledgers and exports of which only a number is kept (checkpoint.keep_ledgers,
    keep_exports) do not count there.
    """

    ledger: float
    export: float
    checkpoints: float
    weights: float
    per_100_steps: float
    whole_run: float


def copied_bytes(stage: StageMemory, dtype_bytes: int) -> float:
    """Bytes that a rank of ``stage`` copies to host memory for a checkpoint, holds until they are written, and writes: its part
    of the optimizer's state and of the weights. Measured: at most 1.02 times that (benchmarks/checkpoint_parallel.py).
    """
    own = stage.optimizer / state_bytes(dtype_bytes)
    return stage.optimizer + dtype_bytes * own


def host_memory(
    config: Config, shape: ModelShape, cluster: Cluster, servers: Servers, work: Workload, stage: StageMemory, dtype_bytes: int
) -> HostMemory:
    """Of a node whose ranks all hold ``stage``, the fullest."""
    ranks = min(cluster.gpus_per_node, cluster.num_trainers)
    process = PROCESS_BYTES[cluster.gpu.is_gpu]
    copy = copied_bytes(stage, dtype_bytes)
    return HostMemory(
        copy=copy,
        processes=ranks * process,
        checkpoint=ranks * copy,
        offloaded=ranks * stage.offloaded,
        answers=TOKEN_BYTES * work.num_asked * (work.mean_answer + work.prompt_tokens),
        engine=0.0 if servers.overlaps else 2 * 2.0 * num_parameters(shape) + servers.num * PROCESS_BYTES[False],
        rollout_node=cluster.gpus_per_node * process if cluster.num_rollout else 0.0,
    )


def check_host(config: Config, memory: HostMemory) -> None:
    """Raise :class:`UserError` if a node that trains has less host memory."""
    if memory.trainer_node > config.cluster.node_memory_gb * GB:
        raise UserError(
            "cluster.node_memory_gb",
            config.cluster.node_memory_gb,
            f"a node that trains needs {memory.trainer_node / GB:,.0f} GB of host memory: {memory.checkpoint / GB:,.0f} for a "
            f"checkpoint's copies, {memory.offloaded / GB:,.0f} for the offloaded optimizer",
            "use more GPUs per replica, lower optimizer.cpu_offload, or correct it if nodes have more",
        )


def disk(config: Config, shape: ModelShape, work: Workload, servers: Servers) -> Disk:
    """What the run leaves in its folder."""
    checkpoint, train = config.checkpoint, config.train
    answers = config.rollout.questions_per_step * config.rollout.group_size
    ledger = LEDGER_BYTES * answers * (work.mean_answer + work.prompt_tokens)
    export = export_bytes(config, shape)
    num_exports = max(1, train.num_steps // checkpoint.export_every if checkpoint.export_every else 0)
    num_ledgers = train.num_steps
    per_step = ledger + (export / checkpoint.export_every if checkpoint.export_every else 0.0)
    if checkpoint.keep_exports is not None:
        num_exports, per_step = min(num_exports, checkpoint.keep_exports), ledger
    if checkpoint.keep_ledgers is not None:
        needed = checkpoint.every * (checkpoint.keep + 1)  # after the oldest checkpoint
        num_ledgers, per_step = min(num_ledgers, max(checkpoint.keep_ledgers, needed)), per_step - ledger
    has_files = servers.overlaps and (config.fleet.weights == "folder" or config.fleet.keep_copy)
    weights = KEPT_VERSIONS * 2.0 * num_parameters(shape) if has_files else 0.0
    checkpoints = (checkpoint.keep + 1) * checkpoint_bytes(config, shape)
    return Disk(
        ledger=ledger,
        export=export,
        checkpoints=checkpoints,
        weights=weights,
        per_100_steps=100 * per_step,
        whole_run=num_ledgers * ledger + num_exports * export + checkpoints + weights,
    )
