"""Which of the run's processes this is, according to the environment that torchrun or Slurm sets."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from nft_megatron.base.errors import UserError


@dataclass(frozen=True)
class RankInfo:
    """Rank and world size; ``local_*`` are those within this machine.

    >>> RankInfo(rank=11, world_size=16, local_rank=3, local_size=8).local_rank
    3
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1


def is_attempt() -> bool:
    """Whether Slurm's agent started this process as an attempt of a run; attempts may follow each other closely."""
    return "NFT_MEGATRON_ATTEMPT" in os.environ


def rank_info() -> RankInfo:
    """From torchrun's variables, else Slurm's, else a single process.

    Slurm's count only together with ``MASTER_ADDR``, which a batch script sets: an interactive shell inside an allocation
    also has a ``SLURM_PROCID`` but is a single process.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return RankInfo(
            int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
        )
    if "SLURM_PROCID" in env and "MASTER_ADDR" in env:
        per_node = re.match(r"\d+", env.get("SLURM_TASKS_PER_NODE", "1"))  # such as 8(x4)
        local_size = int(per_node.group()) if per_node else 1
        world_size, local_rank = int(env.get("SLURM_NTASKS", 1)), int(env.get("SLURM_LOCALID", 0))
        return RankInfo(int(env["SLURM_PROCID"]), world_size, local_rank, local_size)
    return RankInfo()


def check_launch() -> None:
    """Raise :class:`UserError` if the environment promises processes that nobody has started: the others would never join.

    In a batch script ``SLURM_PROCID`` is 0 and ``SLURM_NTASKS`` the job's number of tasks, but only what ``srun`` starts is a
    task of a step. A step's number may also be inherited, by sbatch from the shell it was called in.
    """
    env, num_tasks = os.environ, rank_info().world_size
    if num_tasks == 1:
        return
    if "RANK" not in env or "WORLD_SIZE" not in env:
        is_step = "SLURM_STEP_ID" in env and env.get("SLURM_STEP_NUM_TASKS", str(num_tasks)) == str(num_tasks)
        if not is_step:
            raise UserError(
                "SLURM_NTASKS",
                num_tasks,
                f"the job has {num_tasks} tasks, but this process was not started by srun, so the others would never join it",
                "start the command with srun, or with torchrun --nproc-per-node N -m nft_megatron …; for one process, unset "
                "MASTER_ADDR",
            )
    for name, example in (("MASTER_ADDR", "the name of the first node"), ("MASTER_PORT", "a free port, such as 29500")):
        if name not in env:
            raise UserError(name, "not set", f"the {num_tasks} processes cannot find each other", f"export it: {example}")
