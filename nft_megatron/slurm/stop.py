"""Stop a run before its last step, for good or until it is submitted again."""

from __future__ import annotations

from nft_megatron.base.errors import UserError
from nft_megatron.slurm.job_folder import JobFolder
from nft_megatron.slurm.submit import active_job
from nft_megatron.slurm.tools import call, jobs_named, show_job


def stop(folder: JobFolder, name: str) -> str:
    """Ask the run whose jobs have this ``name`` to save and exit without a successor, and cancel waiting jobs.

    Returns what was done. Raises ``UserError`` if there is no job.
    """
    job_id = active_job(folder, name)
    if job_id is None or folder.end() is not None:
        raise UserError("RUN", folder.run.root, "has no job to stop", f"`nft-megatron slurm status {folder.run.root}` says why")
    folder.stopping.write_text("nft-megatron slurm stop\n")
    job = show_job(job_id)
    waiting = jobs_named(job["JobName"], "PENDING")
    for other in waiting:
        call("scancel", other)
    if job["JobState"] == "RUNNING":
        folder.run.stop.write_text("nft-megatron slurm stop\n")
        return f"job {job_id} will save and exit after this step; `nft-megatron slurm status {folder.run.root}` shows when"
    folder.set_end("stopped", "nft-megatron slurm stop")
    return f"removed job {' '.join(waiting) or job_id} from the queue"
