"""Section ``slurm`` of the configuration."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, PositiveInt

from nft_megatron.base.config_model import ConfigModel, LoosePath, PositiveFloat, TextList
from nft_megatron.base.errors import UserError

_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")


def _time_limit(value: object) -> object:
    """A number is one of seconds, which YAML 1.1 makes of an unquoted 24:00:00."""
    if isinstance(value, int):
        return f"{value // 3600}:{value // 60 % 60:02}:{value % 60:02}"
    if isinstance(value, str) and not _TIME.fullmatch(value):
        raise UserError("slurm.time", value, "is no time limit", "write hours:minutes:seconds, or days-hours")
    return value


class SlurmConfig(ConfigModel):
    """The batch job that `nft-megatron slurm` renders and submits. Its nodes are those of section ``cluster``."""

    partition: str | None = None
    """null: the cluster's default."""
    account: str | None = None
    """Whom it is billed to. null: your default."""
    time: Annotated[str, BeforeValidator(_time_limit)] = "24:00:00"
    """Time limit of one job, as "hours:minutes:seconds" or "days-hours"; a bare number means seconds. The
    run goes on in the next one."""
    job_name: str | None = None
    """null: the name of the run folder and four digits for its place. Of jobs with one name only one runs at a time."""
    sbatch: TextList = ()
    """Further options of sbatch, such as "--qos=high" or "--reservation=tuesday"."""
    gres: str = "gpu:{gpus_per_node}"
    """What is asked of every node. Empty: nothing, on clusters without GPUs or without this way of naming them."""
    setup: TextList = ()
    """Lines of the batch script before anything runs, such as "module load cuda/12.8" or "export NCCL_IB_HCA=mlx5"."""
    python: LoosePath | None = None
    """Python of all processes. null: the one that submits, or ``python3`` in a container."""
    container_image: str | None = None
    """Pyxis image of trainers and servers, with nft_megatron in it. The job's own script and agent run outside."""
    container_mounts: TextList = ()
    """Pyxis mounts, such as "/shared:/shared": run folder, model and data keep the paths that they have outside."""
    signal_seconds: PositiveInt = 600
    """So long before the time limit the run is asked to save and leave. Should cover the longest update with its save."""
    restart: Literal["requeue", "chain"] = "requeue"
    """``requeue``: the job puts itself back into the queue. ``chain``: for sites that forbid it, `submit` submits
    ``chain_jobs`` jobs, each to begin after the one before."""
    chain_jobs: PositiveInt = 7
    """Jobs of a chain."""
    max_failures: PositiveInt = 3
    """So many attempts in a row without progress, and the run gives up."""
    plan: bool = True
    """Submit only what `nft-megatron plan` says fits. false: for models with experts, kinds of GPU that it does not know, or
    where you know better than its estimates."""
    preflight: bool = True
    """Before each attempt look at every node: shared folder, GPUs and their errors, a short all-reduce over all. A bad node is
    excluded."""
    preflight_seconds: PositiveFloat = 300.0
    """Longest preflight; a node that has said nothing by then is bad."""
    preflight_command: str | None = None
    """The site's own check, run by a shell on every node: any exit code but 0, or none within 120 s, makes the node
    a bad one."""
    exclude_after: PositiveInt = 2
    """A node that is blamed for the end of so many attempts in a row, of those it took part in, is excluded too."""
    max_excluded: PositiveInt = 8
    """With more bad nodes than this the run gives up: the fault is then elsewhere."""
