"""The command lines of a job: which step runs where, under srun."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from nft_megatron.config.schema import Config
from nft_megatron.config.slurm import GPUS_PER_NODE
from nft_megatron.rollout.fleet.nccl import servers_python
from nft_megatron.slurm.quoting import file_pattern

SECONDS_AFTER_FIRST_END = 60
"""Time that the other ranks have, once one has ended, to write their exit reports."""

_KEPT = ("SLURM_CONF", "SLURM_JOB_ID", "SLURM_JOBID", "SLURM_CLUSTER_NAME")


def step_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for a new step of its job.

    Without what Slurm set for the job's script or another step, whose task counts and bindings would be wrong for the new
    step.
    """
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key in _KEPT}
    return inherited | dict(extra)


def python_of(config: Config) -> str:
    """The Python of a job's processes."""
    settings = config.slurm
    return str(settings.python or ("python3" if settings.container_image else sys.executable))


def trainer_step(config: Config, config_path: Path, nodes: Sequence[str], cpus_per_node: int, log: Path) -> list[str]:
    """All ranks, directly under srun, which ends a minute after the first rank ends, so that the others can report why."""
    per_node = config.cluster.gpus_per_node
    return [
        *_srun(config, nodes, tasks_per_node=per_node, cpus_per_node=cpus_per_node),
        "--kill-on-bad-exit=0",
        f"--wait={SECONDS_AFTER_FIRST_END}",
        f"--output={file_pattern(log)}",
        f"--error={file_pattern(log)}",
        "--open-mode=append",
        python_of(config),
        "-u",
        "-m",
        "nft_megatron",
        "train",
        str(config_path),
    ]


def rollout_step(config: Config, config_path: Path, node: str, cpus_per_node: int, log: Path) -> list[str]:
    """The servers of one node: each is a task that restarts its server when it dies."""
    servers = servers_per_node(config)
    return [
        *_srun(config, [node], tasks_per_node=servers, cpus_per_node=cpus_per_node),
        "--kill-on-bad-exit=0",
        f"--output={file_pattern(log)}",
        f"--error={file_pattern(log)}",
        "--open-mode=append",
        python_of(config),
        "-u",
        "-m",
        "nft_megatron",
        "serve",
        str(config_path),
        "--devices=auto",
        "fleet.host=0.0.0.0",
    ]


def preflight_step(config: Config, nodes: Sequence[str], cpus_per_node: int, folder: Path) -> list[str]:
    """One task per requested GPU, else one per node. They report to ``folder``."""
    tasks = config.cluster.gpus_per_node if config.slurm.gres else 1
    command = [
        *_srun(config, nodes, tasks_per_node=tasks, cpus_per_node=cpus_per_node),
        "--kill-on-bad-exit=0",
        f"--output={file_pattern(folder)}/output.log",
        f"--error={file_pattern(folder)}/output.log",
        python_of(config),
        "-m",
        "nft_megatron.slurm.preflight",
        str(folder),
        f"--gpus={config.cluster.gpus_per_node if config.slurm.gres else 0}",
        f"--seconds={config.slurm.preflight_seconds:g}",
    ]
    if config.slurm.preflight_command:
        command.append(f"--command={config.slurm.preflight_command}")
    if python := servers_python(config):
        command.append(f"--servers-python={python}")
    return command


def servers_per_node(config: Config) -> int:
    """vLLM servers that share a rollout node."""
    return max(1, config.cluster.gpus_per_node // config.fleet.tensor_parallel)


def _srun(config: Config, nodes: Sequence[str], *, tasks_per_node: int, cpus_per_node: int) -> list[str]:
    settings = config.slurm
    command = [
        "srun",
        f"--nodes={len(nodes)}",
        f"--nodelist={','.join(nodes)}",
        f"--ntasks={len(nodes) * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        f"--cpus-per-task={max(1, cpus_per_node // tasks_per_node)}",
        "--distribution=block",
        "--cpu-bind=none",
        "--overlap",
    ]
    if settings.gres:
        command.append(f"--gres={gres_of(config)}")
    if settings.container_image:
        command.append(f"--container-image={settings.container_image}")
        command += [f"--container-mounts={','.join(settings.container_mounts)}"] if settings.container_mounts else []
    return command


def gres_of(config: Config) -> str:
    """The resources requested of each node."""
    return config.slurm.gres.replace(GPUS_PER_NODE, str(config.cluster.gpus_per_node))
