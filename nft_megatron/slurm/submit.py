"""Submitting a run, and more servers for a running one."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.errors import UserError
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.config.load import dump_config
from nft_megatron.config.places import check_places
from nft_megatron.config.schema import Config
from nft_megatron.slurm.job_folder import JobFolder
from nft_megatron.slurm.options import excluded_nodes
from nft_megatron.slurm.render import check, job_name, render, render_rollouts
from nft_megatron.slurm.tools import SlurmError, call, jobs_named, show_job

ACTIVE = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED")


def prepare(config: Config) -> Config:
    """Check the run and write RUN/slurm. Returns the configuration as written, with absolute paths.

    Raises:
        UserError: a file is missing, the run does not fit its GPUs, one of its jobs is active, or Slurm refuses the script.
    """
    config = _absolute(config)
    check_places(config)
    check(config)
    folder = JobFolder(RunFolder(config.run_dir))
    _check_files(config)
    if (job_id := active_job(folder, job_name(config))) is not None:
        raise UserError(
            "run_dir",
            config.run_dir,
            f"job {job_id} is active on it",
            f"wait for it, or `nft-megatron slurm stop {config.run_dir}`",
        )
    script = render(config, folder.config)
    for path, text in (
        (folder.root / "plan.txt", _plan(config)),
        (folder.config, dump_config(config)),
        (folder.script, script),
    ):
        with atomic_file(path) as temporary:
            temporary.write_text(text)
    _sbatch("--test-only", str(folder.script))
    folder.reopen()
    return config


def submit(config: Config) -> list[str]:
    """:func:`prepare` the run and submit it. Returns its job ids in the order in which they run."""
    config = prepare(config)
    folder = JobFolder(RunFolder(config.run_dir))
    jobs: list[str] = []
    for _ in range(config.slurm.chain_jobs if config.slurm.restart == "chain" else 1):
        after = [f"--dependency=afterany:{jobs[-1]},singleton"] if jobs else []
        jobs.append(_sbatch("--parsable", *after, *_without(folder, config), str(folder.script)).split(";")[0])
        folder.set_job_id(jobs[0])
    return jobs


def _plan(config: Config) -> str:
    """The plan's report. Raises ``UserError`` for a run that does not fit, unless slurm.plan is false."""
    if not config.slurm.plan:
        return "slurm.plan = false\n"
    from nft_megatron.plan.command import plan_run

    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        try:
            plan_run(config)
        except UserError as error:
            remedy = f"{error.remedy}; or, if you know better, submit with slurm.plan=false"
            raise UserError(error.field, error.value, error.problem, remedy) from error
    return report.getvalue()


def add_rollouts(folder: JobFolder, config: Config, count: int) -> str:
    """Submit an array of ``count`` nodes whose servers join the run; returns its job id."""
    script = folder.root / "rollouts.sh"
    text = render_rollouts(config, folder.config, count)
    with atomic_file(script) as temporary:
        temporary.write_text(text)
    return _sbatch("--parsable", *_without(folder, config), str(script)).split(";")[0]


def active_job(folder: JobFolder, name: str) -> str | None:
    """The id of the run's waiting or running job: the newest known one, else one of its ``name``, as in a chain."""
    job_id = folder.job_id()
    state = show_job(job_id).get("JobState", "") if job_id else ""
    if state in ACTIVE:
        return job_id
    return next(iter(jobs_named(name)), None)


def _without(folder: JobFolder, config: Config) -> list[str]:
    """sbatch's option that keeps jobs off bad nodes and those that the user excludes."""
    nodes = ",".join([*excluded_nodes(config.slurm.sbatch), *folder.excluded()])
    return [f"--exclude={nodes}"] if nodes else []


def _sbatch(*arguments: str) -> str:
    try:
        return call("sbatch", *arguments)
    except SlurmError as error:
        raise UserError(
            "slurm",
            arguments[-1],
            str(error),
            "change section slurm of the configuration; if nodes are only temporarily unavailable, run sbatch on that script",
        ) from error


def _absolute(config: Config) -> Config:
    """The configuration with absolute paths, which do not depend on where the job starts."""
    return Config.model_validate(_with_absolute_paths(config.model_dump()))


def _with_absolute_paths(value: Any) -> Any:
    if isinstance(value, Path):
        return value.absolute()  # not resolved: a virtual environment's python is a link
    if isinstance(value, dict):
        return {key: part if _is_command(key, part) else _with_absolute_paths(part) for key, part in value.items()}
    return tuple(map(_with_absolute_paths, value)) if isinstance(value, tuple) else value


def _is_command(key: str, value: Any) -> bool:
    """Whether ``value`` is a bare command such as python3, looked up where it runs."""
    return key == "python" and isinstance(value, Path) and len(value.parts) == 1


def _check_files(config: Config) -> None:
    files: list[tuple[str, Path]] = [("model.path", config.model.path)]
    files += [("data.train", path) for path in config.data.train]
    files += [("evaluate.data", path) for path in config.evaluate.data]
    for field, path in files:
        if not path.exists():
            raise UserError(field, path, "no such file or folder", "check the path; all nodes of the job must see it")
