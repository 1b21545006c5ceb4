"""``nft-megatron slurm``."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nft_megatron.base.deadline import Deadline
from nft_megatron.base.errors import UserError
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.cli.arguments import add_config, describe, user_path
from nft_megatron.config.load import load_config

if TYPE_CHECKING:
    from nft_megatron.config.schema import Config
    from nft_megatron.slurm.job_folder import JobFolder

_CONFIG_SECONDS = 600.0
"""A job may begin while the shared file system is unreachable."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Help and arguments of this command."""
    parser.description = "Train as a batch job that resumes by itself until the run is finished. See slurm/README.md."
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], purpose: str, description: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=purpose)
        describe(command, run, description)
        return command

    add_config(add("render", _render, "print the batch script", "Print the batch script of a run. Nothing is submitted."))
    add_config(
        add(
            "submit",
            _submit,
            "check everything and submit",
            "Check configuration, files and plan, ask Slurm whether it would accept the script (--test-only), then submit it. "
            "Submitting a run again after it ended resumes it from its last checkpoint.",
        )
    )
    status = add("status", _status, "job, step, attempts, causes", "Show the run's job, its step, and how every attempt ended.")
    status.add_argument("--json", action="store_true", help="for programs")
    logs = add("logs", _logs, "output of trainers or servers", "Print the end of a log.")
    logs.add_argument("--attempt", type=int, help="default: the newest")
    logs.add_argument("--rollout", metavar="NODE", help="servers on this node, of the run's job or another")
    logs.add_argument("-f", "--follow", action="store_true", help="follow the log until Ctrl-C")
    logs.add_argument("-n", "--lines", type=int, default=50, help="(default: %(default)s)")
    attach = add(
        "attach",
        _attach,
        "a shell on a node of the job",
        "Open a shell on a node of the running job, or run a command on that node, as in attach --node n3 RUN -- nvidia-smi.",
    )
    attach.add_argument("--node", help="default: the first trainer's")
    checkpoint = add("checkpoint", _checkpoint, "save and continue", "Request a checkpoint after the current step.")
    stop = add(
        "stop",
        _stop,
        "save, exit, do not restart",
        "Ask the run to save and exit, and remove it from the queue. `submit` resumes it.",
    )
    rollouts = add(
        "rollouts",
        _rollouts,
        "more servers for a running run",
        "Submit an array of single nodes whose vLLM servers join the run. They may be preempted; they end with the run.",
    )
    rollouts.add_argument("--add", metavar="N", type=int, required=True, help="nodes")
    agent = add("agent", _agent, "what the batch script runs", "Run one job from its first node. The batch script calls this.")
    agent.add_argument(
        "--rollouts-only", action="store_true", help="run servers on all nodes of this job, for another job's run"
    )
    add_config(agent)
    for command in (status, logs, attach, checkpoint, stop, rollouts):
        command.add_argument("run_folder", metavar="RUN|CONFIG", type=user_path, help="the run's folder, or its configuration")
    attach.add_argument("command", nargs="*", help="run this instead of a shell")
    rollouts.add_argument(
        "overrides", metavar="section.key=value", nargs="*", default=[], help="such as slurm.partition=preemptible"
    )


def _render(options: argparse.Namespace) -> None:
    from nft_megatron.slurm.render import render

    config = load_config(options.config, options.overrides)
    print(render(config, options.config.resolve(), options.overrides), end="")


def _submit(options: argparse.Namespace) -> None:
    from nft_megatron.slurm.submit import submit

    config = load_config(options.config, options.overrides)
    jobs = submit(config)
    print(f"submitted job {', '.join(jobs)} for {config.run_dir}")
    print(f"  nft-megatron slurm status {config.run_dir}\n  nft-megatron slurm logs -f {config.run_dir}")


def _status(options: argparse.Namespace) -> None:
    from rich.console import Console

    from nft_megatron.slurm.status import read_status, show

    folder, config = _submitted(options)
    status = read_status(folder, config)
    print(status.as_json()) if options.json else show(status, Console())


def _logs(options: argparse.Namespace) -> None:
    folder, _ = _submitted(options)
    attempt = options.attempt or max((each.number for each in folder.attempts()), default=0)
    name = f"rollout_{options.rollout}.log" if options.rollout else "trainer.log"
    path = folder.logs(attempt) / name
    if options.rollout and not path.exists():  # in a separate job
        path = max(folder.root.glob(f"rollouts/*_{options.rollout}.log"), key=os.path.getmtime, default=path)
    if not path.exists():
        there = sorted(str(log.relative_to(folder.run.root)) for log in folder.run.root.glob("logs/attempt_*/*.log"))
        raise UserError("logs", path, "does not exist", f"existing logs: {', '.join(there) or 'none yet'}")
    os.execvp("tail", ["tail", f"--lines={options.lines}", *(["-F"] if options.follow else []), str(path)])


def _attach(options: argparse.Namespace) -> None:
    folder, config = _submitted(options)
    attempts = folder.attempts()
    job_id = _active(folder, config)
    if not attempts or attempts[-1].kind is not None:
        raise UserError("attach", job_id, "the job is not running", f"`nft-megatron slurm status {folder.run.root}` says why")
    node = options.node or attempts[-1].nodes[0]
    what = [word for word in options.command if word != "--"] or ["bash", "-i"]
    pty = [] if options.command else ["--pty"]
    command = ["srun", f"--jobid={job_id}", "--overlap", f"--nodelist={node}", "--nodes=1", "--ntasks=1", *pty, *what]
    print(shlex.join(command), flush=True)
    os.execvp("srun", command)


def _checkpoint(options: argparse.Namespace) -> None:
    folder, config = _submitted(options)
    _active(folder, config)
    folder.run.save_request.write_text("nft-megatron slurm checkpoint\n")
    print("requested a checkpoint after the current step")


def _stop(options: argparse.Namespace) -> None:
    from nft_megatron.slurm.render import job_name
    from nft_megatron.slurm.stop import stop

    folder, config = _submitted(options)
    print(stop(folder, job_name(config)))


def _rollouts(options: argparse.Namespace) -> None:
    from nft_megatron.slurm.submit import add_rollouts

    folder, config = _submitted(options, options.overrides)
    print(f"submitted job {add_rollouts(folder, config, options.add)}: {options.add} nodes for {folder.run.root}")


def _agent(options: argparse.Namespace) -> None:
    from nft_megatron.slurm.agent import Agent
    from nft_megatron.slurm.guests import serve_guests
    from nft_megatron.slurm.job import Job

    job, deadline = Job.here(), Deadline.of(_CONFIG_SECONDS)
    while not os.path.exists(options.config) and not deadline.has_passed:
        time.sleep(1)
    if job.num_restarts and not os.path.exists(options.config):
        job.requeue(())  # its folder has been unreachable for longer
        return
    config = load_config(options.config, options.overrides)
    if options.rollouts_only:
        serve_guests(config, options.config, job)
    else:
        Agent(config, job).conduct()


def _submitted(options: argparse.Namespace, overrides: Sequence[str] = ()) -> tuple[JobFolder, Config]:
    """The folder of a submitted run, and its submitted configuration."""
    from nft_megatron.slurm.job_folder import JobFolder

    path: Path = options.run_folder
    root = path if path.is_dir() else load_config(path, []).run_dir
    folder = JobFolder(RunFolder(root.resolve()))
    if not folder.config.exists():
        raise UserError("RUN", root, "has not been submitted", "run `nft-megatron slurm submit CONFIG` first")
    return folder, load_config(folder.config, list(overrides))


def _active(folder: JobFolder, config: Config) -> str:
    from nft_megatron.slurm.render import job_name
    from nft_megatron.slurm.submit import active_job

    job_id = active_job(folder, job_name(config))
    if job_id is None:
        raise UserError(
            "RUN", folder.run.root, "has no waiting or running job", f"`nft-megatron slurm status {folder.run.root}` says why"
        )
    return job_id
