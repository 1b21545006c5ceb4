"""Separate jobs whose servers join a run: ``nft-megatron slurm rollouts --add N``."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path

from nft_megatron.base.run_folder import RunFolder
from nft_megatron.config.schema import Config
from nft_megatron.slurm.job import Job
from nft_megatron.slurm.job_folder import JobFolder
from nft_megatron.slurm.rollout_nodes import RolloutNodes
from nft_megatron.slurm.steps import rollout_step, step_environment

log = logging.getLogger(__name__)

_PAUSE = 2.0


def serve_guests(config: Config, config_path: Path, job: Job) -> None:
    """Run servers on all nodes of this job until the run ends or a signal stops them; requeue the job near its time limit."""
    folder = JobFolder(RunFolder(config.run_dir.resolve()))
    leaving, out_of_time = threading.Event(), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: leaving.set())
    signal.signal(signal.SIGUSR1, lambda *_: out_of_time.set())
    logs = folder.root / "rollouts"
    logs.mkdir(exist_ok=True)
    nodes = RolloutNodes(
        job.nodes,
        lambda node: rollout_step(config, config_path, node, job.cpus_per_node, logs / f"{job.id}_{node}.log"),
        step_environment({}),
    )
    try:
        while not _has_ended(folder) and not out_of_time.is_set() and not leaving.wait(_PAUSE):
            pass
    finally:
        nodes.close()
    if out_of_time.is_set() and not _has_ended(folder) and config.slurm.restart == "requeue":
        job.requeue(())


def _has_ended(folder: JobFolder) -> bool:
    """Whether the run is known to have ended: False while its folder cannot be read."""
    try:
        return folder.end() is not None
    except OSError as error:
        log.warning("cannot tell whether the run has ended: %s", error)
        return False
