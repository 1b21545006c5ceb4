"""``nft-megatron slurm submit`` through NeMo-Run (``pip install 'nft_megatron[slurm]'``); see README.md.

    python slurm/nemo_run_recipe.py CONFIG [section.key=value …] [--dry-run]

The experiment is one script of one task, on the first node of the job: the same agent as in the plain batch script, which
starts everything else. NeMo-Run's own retries are off, because the agent requeues the job. NeMo-Run writes to RUN/slurm/nemo,
or to NEMORUN_HOME if that is set (a folder that all nodes see).
"""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

from nft_megatron.base.errors import UserError
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.cli.arguments import user_path
from nft_megatron.config.load import load_config
from nft_megatron.config.schema import Config
from nft_megatron.slurm.job_folder import JobFolder
from nft_megatron.slurm.render import job_name, num_nodes
from nft_megatron.slurm.steps import gres_of, python_of
from nft_megatron.slurm.submit import prepare

AGENT_STEP = ["--nodes=1", "--ntasks=1", "--relative=0", "--overlap"]
"""On the job's first node, which it shares with the trainers."""


def sbatch_options(options: tuple[str, ...]) -> dict[str, str | bool]:
    """``slurm.sbatch`` in NeMo-Run's form.

    >>> sbatch_options(("--qos=high", "--contiguous"))
    {'qos': 'high', 'contiguous': True}

    Raises UserError for the short form of an option.
    """
    parameters: dict[str, str | bool] = {}
    for option in options:
        name, equals, value = option.removeprefix("--").partition("=")
        if not option.startswith("--") or " " in name:
            raise UserError("slurm.sbatch", option, "is not of the form --option=value", "write the option's long name and a =")
        parameters[name] = value if equals else True
    return parameters


def check(config: Config) -> None:
    """Raise UserError for settings that NeMo-Run cannot express."""
    if config.slurm.account is None:
        raise UserError("slurm.account", None, "is required by NeMo-Run", "set it to the account to bill")
    if config.slurm.restart == "chain":
        raise UserError("slurm.restart", "chain", "is not supported with NeMo-Run", "use `nft-megatron slurm submit`")
    if "/nemo_run" in str(config.run_dir.resolve()):
        raise UserError("run_dir", config.run_dir, "contains /nemo_run, which NeMo-Run replaces", "choose another name")
    for field, path in (("run_dir", config.run_dir.resolve()), ("the current folder", Path.cwd())):
        if not re.fullmatch(r"[\w/.,:=@+-]+", str(path)):
            raise UserError(field, path, "NeMo-Run writes it unquoted into its batch script", "use no spaces, quotes, % and #")
    for field in ("account", "partition", "gres"):
        _check_unquoted(f"slurm.{field}", getattr(config.slurm, field) or "")
    for name, value in sbatch_options(config.slurm.sbatch).items():
        _check_unquoted("slurm.sbatch", f"--{name}={value}")


def _check_unquoted(field: str, value: str) -> None:
    if re.search(r"[\s\"'#\\]", value):
        raise UserError(field, value, "NeMo-Run writes it unquoted into its batch script", "use no spaces, quotes and #")


def submit(config: Config, dry_run: bool) -> str | None:
    """Submit the prepared ``config``; returns the job's id. A dry run prints the batch script instead."""
    settings, folder = config.slurm, JobFolder(RunFolder(config.run_dir))
    os.environ.setdefault("NEMORUN_HOME", str(folder.root / "nemo"))  # read when it is imported
    try:
        import nemo_run  # takes 12 s
        from nemo_run.core.execution.slurm import SlurmJobDetails
    except ModuleNotFoundError as error:
        raise UserError("nemo_run", error.name, "is not installed", "pip install 'nft_megatron[slurm]'") from error

    executor = nemo_run.SlurmExecutor(
        account=settings.account,
        partition=settings.partition,
        time=settings.time,
        nodes=num_nodes(config),
        ntasks_per_node=1,
        gres=gres_of(config) if settings.gres else None,
        mem="0",
        exclusive=True,
        exclude=",".join(folder.excluded()) or None,
        # To the steps, which include the agent: the job's own script is NeMo-Run's, and USR1 would end it.
        signal=f"USR1@{settings.signal_seconds}",
        setup_lines="\n".join(["trap '' USR1", *settings.setup]),
        srun_args=[*AGENT_STEP, f"--chdir={Path.cwd()}"],
        additional_parameters={"dependency": "singleton", "requeue": True, **sbatch_options(settings.sbatch)},
        job_details=SlurmJobDetails(job_name=job_name(config), folder=str(folder.root)),
        packager=nemo_run.Packager(),  # the code is installed, not packaged
        tunnel=nemo_run.LocalTunnel(job_dir=""),
        poll_estimated_start_time=False,
    )
    python = (
        sys.executable if settings.container_image else python_of(config)
    )  # the agent runs outside the container, where srun is
    agent = shlex.join([python, "-u", "-m", "nft_megatron", "slurm", "agent", str(folder.config)])
    with nemo_run.Experiment(job_name(config), skip_status_at_exit=True) as experiment:  # the status would need sacct
        experiment.add(nemo_run.Script(inline=f"exec {agent}\n"), executor=executor, name="agent")
        if dry_run:
            experiment.dryrun()
            return None
        experiment.run(detach=True)
        job_id = experiment.jobs[0].handle.partition("://")[2].split("/")[1]
    folder.set_job_id(job_id)
    return job_id


def main() -> None:
    """Parse, check, submit; a user's mistake yields one message and exit code 2."""
    parser = argparse.ArgumentParser(description="Submit a run through NeMo-Run.")
    parser.add_argument("config", type=user_path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print NeMo-Run's batch script")
    options = parser.parse_args()
    try:
        config = load_config(options.config, options.overrides)
        check(config)
        config = prepare(config)
        job_id = submit(config, options.dry_run)
    except UserError as error:
        print(f"nemo_run_recipe: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if job_id is not None:
        print(f"submitted job {job_id} for {config.run_dir}")


if __name__ == "__main__":
    main()
