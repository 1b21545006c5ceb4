"""Which of the run's processes this is, according to the environment that torchrun or Slurm sets."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass


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
    if "RANK" in env:
        return RankInfo(
            int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
        )
    if "SLURM_PROCID" in env and "MASTER_ADDR" in env:
        per_node = re.match(r"\d+", env.get("SLURM_TASKS_PER_NODE", "1"))  # such as 8(x4)
        local_size = int(per_node.group()) if per_node else 1
        return RankInfo(int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"]), local_size)
    return RankInfo()
