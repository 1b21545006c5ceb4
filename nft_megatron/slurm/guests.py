"""Nodes of a job of their own whose servers join a run: ``nft-megatron slurm rollouts --add N``."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

from nft_megatron.config import Config
from nft_megatron.run_folder import RunFolder
from nft_megatron.slurm.job import Job
from nft_megatron.slurm.job_folder import JobFolder
from nft_megatron.slurm.rollout_nodes import RolloutNodes
from nft_megatron.slurm.steps import rollout_step, step_environment

_PAUSE = 2.0


def serve_guests(config: Config, config_path: Path, job: Job) -> None:
    """Keep servers on all nodes of this job until the run ends, or this job is told to leave."""
    folder = JobFolder(RunFolder(config.run_dir.resolve()))
    leaving = threading.Event()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: leaving.set())
    logs = folder.root / "rollouts"
    logs.mkdir(exist_ok=True)
    nodes = RolloutNodes(
        job.nodes,
        lambda node: rollout_step(config, config_path, node, job.cpus_per_node, logs / f"{job.id}_{node}.log"),
        step_environment({}),
    )
    try:
        while folder.end() is None and not leaving.wait(_PAUSE):
            pass
    finally:
        nodes.close()
