"""The job that a process belongs to: its nodes, its time limit, and how it is requeued."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection
from dataclasses import dataclass

from nft_megatron.base.errors import UserError
from nft_megatron.slurm.tools import SlurmError, host_names, insist, jobs_named, show_job

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """This process's job. ``nodes`` are in Slurm's order, this one first. ``end`` is the time limit."""

    id: str
    nodes: tuple[str, ...]
    cpus_per_node: int
    end: float

    @classmethod
    def here(cls) -> Job:
        """From the environment of the batch script."""
        if "SLURM_JOB_ID" not in os.environ:
            raise UserError(
                "SLURM_JOB_ID", "not set", "the agent runs only inside a job", "use `nft-megatron slurm submit CONFIG`"
            )
        env, job_id = os.environ, os.environ["SLURM_JOB_ID"]
        if "SLURM_ARRAY_TASK_ID" in env:  # a task's bare id may be that of the whole array
            job_id = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
        answer = show_job(job_id, insist)
        end = answer.get("EndTime", "Unknown")
        limit = time.mktime(time.strptime(end, "%Y-%m-%dT%H:%M:%S")) if end[0].isdigit() else float("inf")
        return cls(
            job_id,
            tuple(host_names(env["SLURM_JOB_NODELIST"])),
            int(env.get("SLURM_CPUS_ON_NODE", os.cpu_count() or 1)),
            limit,
        )

    @property
    def num_restarts(self) -> int:
        """How often Slurm has restarted this job."""
        return int(os.environ.get("SLURM_RESTART_COUNT", "0"))

    def requeue(self, excluded: Collection[str]) -> None:
        """Requeue this job without the ``excluded`` nodes. Slurm then ends what is left of it."""
        job = show_job(self.id, insist)
        state = job.get("JobState", "gone")
        is_this_start = job.get("Restarts", "0") == str(self.num_restarts)
        if state != "RUNNING" or not is_this_start:  # a person cancelled it, or Slurm has already requeued it
            log.warning("the job is %s: not requeueing it", state)
            return
        insist("scontrol", "requeue", self.id)
        self._exclude(self.id, excluded)

    def exclude_from_those_that_wait(self, excluded: Collection[str]) -> None:
        """Keep the user's waiting jobs of this one's name away from the ``excluded`` nodes."""
        name = show_job(self.id, insist)["JobName"]
        for job_id in jobs_named(name, "PENDING"):
            self._exclude(job_id, excluded)

    def _exclude(self, job_id: str, nodes: Collection[str]) -> None:
        if not nodes:
            return
        try:
            before = show_job(job_id, insist).get("ExcNodeList", "(null)").replace("(null)", "")
            everything = ",".join([*([before] if before else []), *nodes])
            insist("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={everything}")
        except SlurmError as error:
            log.warning("could not exclude %s from job %s: %s", ", ".join(nodes), job_id, error)
