"""The batch script."""

from __future__ import annotations

import re
import shlex
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

from nft_megatron.base.errors import UserError
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.config.schema import Config
from nft_megatron.slurm.job_folder import JobFolder
from nft_megatron.slurm.options import check_own_options
from nft_megatron.slurm.quoting import file_pattern, own_option, sbatch_word
from nft_megatron.slurm.steps import gres_of, python_of


def job_name(config: Config) -> str:
    """Slurm runs only one job per name and user at a time, so every run needs its own name, wherever its folder is.

    What Slurm's commands read as a separator, such as a space or a comma, becomes a dash.
    """
    run_dir = config.run_dir.resolve()
    name = config.slurm.job_name or f"{run_dir.name}-{zlib.crc32(bytes(run_dir)) & 0xFFFF:04x}"
    return re.sub(r"[^\w.+:@-]+", "-", name, flags=re.ASCII)


def num_nodes(config: Config) -> int:
    """Number of nodes of the job."""
    return config.cluster.trainer_nodes + config.cluster.rollout_nodes


def render(config: Config, config_path: Path, overrides: Sequence[str] = ()) -> str:
    """The batch script of a run: the request to Slurm, the set-up, one command.

    That command reads ``config_path`` and ``overrides``. The job starts in the current folder.

    Raises:
        UserError: rollout nodes that would never be used; an option, a folder or a path that the script cannot have.
    """
    check(config)
    folder = _folder(config).root
    options = [
        f"--job-name={job_name(config)}",
        f"--nodes={num_nodes(config)}",
        "--requeue" if config.slurm.restart == "requeue" else "--no-requeue",
        f"--signal=B:USR1@{config.slurm.signal_seconds}",
        "--dependency=singleton",
    ]
    roles = f"{config.cluster.trainer_nodes} nodes train"
    if config.cluster.rollout_nodes:
        roles += f", {config.cluster.rollout_nodes} generate"
    comment = [
        f"{job_name(config)}: {roles}. Rendered by `nft-megatron slurm render`; sbatch needs the folder",
        f"{folder}, which `nft-megatron slurm submit` creates.",
    ]
    return _script(config, comment, options, "job_%j.log", [str(config_path), *overrides])


def render_rollouts(config: Config, config_path: Path, count: int) -> str:
    """The batch script of an array of ``count`` single nodes whose servers join the run and may leave at any time."""
    check(config, rollouts=True)
    name = f"{job_name(config)}-rollouts"
    options = [f"--job-name={name}", f"--array=1-{count}", "--nodes=1", "--requeue", "--signal=B:USR1@60"]
    comment = [f"Servers for {job_name(config)} on {count} more nodes; they end with the run."]
    return _script(config, comment, options, "rollouts_%A_%a.log", [str(config_path), "--rollouts-only"])


def _script(config: Config, comment: Sequence[str], options: Sequence[str], log: str, arguments: Sequence[str]) -> str:
    """Whole nodes, the set-up, the agent with its ``arguments``. ``log``: a pattern of Slurm, in RUN/slurm."""
    settings = config.slurm
    common = [
        "--exclusive",
        "--mem=0",
        *([f"--gres={gres_of(config)}"] if settings.gres else []),
        f"--time={settings.time}",
        *([f"--partition={settings.partition}"] if settings.partition else []),
        *([f"--account={settings.account}"] if settings.account else []),
        "--open-mode=append",
        f"--chdir={Path.cwd()}",
        f"--output={file_pattern(_folder(config).root)}/{log}",
    ]
    lines = [*map(sbatch_word, (*options, *common)), *map(own_option, settings.sbatch)]
    python = (
        sys.executable if settings.container_image else python_of(config)
    )  # the agent runs outside the container, where srun is
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"# {line}" for line in comment),
            *(f"#SBATCH {line}" for line in lines),
            "",
            "set -eo pipefail",  # not -u: module files and profiles use variables that are not set
            *settings.setup,
            "",
            "# The agent checks the nodes, starts trainers and servers on them with srun, and decides what follows their end.",
            "# Slurm's signals must reach it (exec), but not kill it before it installs its handlers (trap).",
            "trap '' USR1",
            f"exec {shlex.join([python, '-u', '-m', 'nft_megatron', 'slurm', 'agent', *arguments])}",
            "",
        ]
    )


def _folder(config: Config) -> JobFolder:
    return JobFolder(RunFolder(config.run_dir.resolve()))


def check(config: Config, *, rollouts: bool = False) -> None:
    """Raise ``UserError`` if nodes would be idle, or for what a batch script cannot say."""
    check_own_options(config.slurm.sbatch)
    if not str(Path.cwd()).isprintable():
        problem, remedy = "the batch script cannot name it", "start from a folder without line breaks and tabs in its path"
        raise UserError("the current folder", Path.cwd(), problem, remedy)
    if (config.cluster.rollout_nodes or rollouts) and config.rollout.engine != "vllm":
        raise UserError(
            "rollout.engine",
            config.rollout.engine,
            "uses no servers, but the job has nodes for them",
            "set rollout.engine=vllm, or cluster.rollout_nodes=0",
        )
