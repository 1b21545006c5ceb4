"""Section ``slurm`` of the configuration."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from nft_megatron.base.config_model import (
    ConfigModel,
    Line,
    LineList,
    LoosePath,
    PositiveFloat,
    PositiveInt,
    ProcessCount,
    TextList,
    as_tuple,
)
from nft_megatron.base.errors import UserError
from nft_megatron.base.paths import expand

_TIME = re.compile(r"([0-9]{1,5}-)?[0-9]{1,9}(:[0-9]{1,9}){0,2}")
_MOST_SECONDS = 10 * 365 * 86_400
GPUS_PER_NODE = "{gpus_per_node}"


def _time_limit(value: object) -> object:
    """A number means seconds; YAML 1.1 makes one of an unquoted 24:00:00."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 < value <= _MOST_SECONDS:
            raise UserError("slurm.time", value, "is not a time limit", "give seconds, more than 0 and less than ten years")
        return f"{value // 3600}:{value // 60 % 60:02}:{value % 60:02}"
    if isinstance(value, str):
        if not _TIME.fullmatch(value):
            raise UserError("slurm.time", value, "is not a time limit", "write hours:minutes:seconds, or days-hours")
        if not 0 < _seconds_of(value) <= _MOST_SECONDS:
            remedy = "write hours:minutes:seconds, or days-hours: more than 0, which means no limit, and less than ten years"
            raise UserError("slurm.time", value, "is not a time limit", remedy)
    return value


def _seconds_of(time: str) -> int:
    """A time limit of Slurm in seconds: minutes, minutes:seconds, hours:minutes:seconds, or days- and hours first.

    >>> [_seconds_of(time) for time in ("90", "1:30", "24:00:00", "2-12", "1-0:30")]
    [5400, 90, 86400, 216000, 88200]
    """
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return int(days or 0) * 86_400 + hours * 3600 + minutes * 60 + seconds


def _known_placeholder(gres: str) -> str:
    if re.search(r"[{}]", gres.replace(GPUS_PER_NODE, "")):
        raise UserError("slurm.gres", gres, "has an unknown placeholder", f"the only one is {GPUS_PER_NODE}")
    return gres


def _at_home(value: object) -> object:
    """The image or mount with ``~`` expanded where it begins with one; docker://… stays as it is."""
    return str(expand(value)) if isinstance(value, str) and value.startswith("~") else value


Mount = Annotated[Line, BeforeValidator(_at_home)]


class SlurmConfig(ConfigModel):
    """The batch job that `nft-megatron slurm` renders and submits. Section ``cluster`` gives its nodes."""

    partition: Line | None = None
    """null: the cluster's default."""
    account: Line | None = None
    """Account to bill. null: your default."""
    time: Annotated[str, BeforeValidator(_time_limit)] = "24:00:00"
    """Time limit of one job, as "hours:minutes:seconds" or "days-hours"; a bare number means seconds. The run resumes in the
    next job."""
    job_name: Line | None = None
    """null: the run folder's name and four digits derived from its path. Only one job of a name runs at a time. What Slurm
    would read as a separator, such as a space, becomes a dash."""
    sbatch: LineList = ()
    """Further options of sbatch, such as "--qos=high" or "--reservation=tuesday". Those that change whose job it is, what it
    runs, or what its restarts rely on are refused."""
    gres: Annotated[Line, AfterValidator(_known_placeholder)] = f"gpu:{GPUS_PER_NODE}"
    """Generic resources requested of every node; {gpus_per_node} is that of section cluster. Empty: none, for clusters without
    GPUs or without gres."""
    setup: TextList = ()
    """Lines of the batch script that run first, such as "module load cuda/12.8" or "export NCCL_IB_HCA=mlx5"."""
    python: LoosePath | None = None
    """Python of all processes. null: the one that submits, or ``python3`` in a container."""
    container_image: Annotated[Line | None, BeforeValidator(_at_home)] = None
    """Pyxis image of trainers and servers; must contain nft_megatron. The job's script and agent run outside it."""
    container_mounts: Annotated[tuple[Mount, ...], BeforeValidator(as_tuple)] = ()
    """Pyxis mounts, such as "/shared:/shared": run folder, model and data must keep the paths they have outside."""
    signal_seconds: Annotated[int, Field(gt=0, le=65535)] = 600
    """How long before the time limit the run is asked to save and exit. Should cover the longest update and its save.
    Slurm takes at most 65535."""
    restart: Literal["requeue", "chain"] = "requeue"
    """``requeue``: the job requeues itself. ``chain``: for sites that forbid requeueing, `submit` submits ``chain_jobs`` jobs,
    each of which begins after the previous one."""
    chain_jobs: ProcessCount = 7
    """Jobs in a chain."""
    max_failures: PositiveInt = 3
    """After this many attempts in a row without progress the run gives up."""
    plan: bool = True
    """Submit only what `nft-megatron plan` says fits. false: for kinds of GPU that it does not know, or when you know better
    than its estimates."""
    preflight: bool = True
    """Check every node before each attempt: shared folder, GPUs and their errors, a short all-reduce over all nodes. Bad nodes
    are excluded."""
    preflight_seconds: PositiveFloat = 300.0
    """Longest preflight; a node that has not reported by then is bad."""
    preflight_command: str | None = None
    """The site's own check, run by a shell on every node: any exit code other than 0, or none within 120 s, marks the node
    as bad."""
    exclude_after: PositiveInt = 2
    """A node blamed for the end of this many attempts in a row, among those it took part in, is also excluded."""
    max_excluded: PositiveInt = 8
    """With more bad nodes than this the run gives up, because the fault must be elsewhere."""
