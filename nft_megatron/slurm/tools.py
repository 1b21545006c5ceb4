"""Slurm's commands, each with a deadline."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

from nft_megatron.base.errors import UserError

_SECONDS = 60.0
_PAUSES = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, *[60.0] * 30)
_ANSWERS = ("Invalid", "already pending", "pending execution")


class SlurmError(RuntimeError):
    """A Slurm command failed; the message is its output."""


def call(*command: str, seconds: float = _SECONDS, env: Mapping[str, str] | None = None) -> str:
    """The output of ``command``.

    Raises:
        UserError: this machine has no such command.
        SlurmError: it failed or did not finish within ``seconds``.
    """
    env = {**(env or os.environ), "SLURM_TIME_FORMAT": "standard"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=env)
    except FileNotFoundError as error:
        raise UserError("slurm", command[0], "no such command", "run this on a machine of a Slurm cluster") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{' '.join(command)}: no reply within {seconds:g} s") from error
    if done.returncode:
        raise SlurmError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip() or done.stderr.strip()  # sbatch --test-only writes to standard error


def insist(*command: str, pauses: Sequence[float] = _PAUSES) -> str:
    """:func:`call`, retried while the controller does not respond, for about half an hour: enough to upgrade a controller."""
    for pause in pauses:
        try:
            return call(*command)
        except SlurmError as error:
            if any(answer in str(error) for answer in _ANSWERS):
                raise
            time.sleep(pause)
    return call(*command)


def fields(text: str) -> dict[str, str]:
    """The fields of one line of ``scontrol show … --oneliner``.

    >>> fields("JobId=7 JobState=RUNNING Reason=None NodeList=n[1-2]")["NodeList"]
    'n[1-2]'
    """
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def show_job(job_id: str, ask: Callable[..., str] = call) -> dict[str, str]:
    """``scontrol``'s fields of a job, empty once it is forgotten. ``ask``: :func:`call` or :func:`insist`."""
    try:
        return fields(ask("scontrol", "show", "job", "--oneliner", job_id))
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise


def jobs_named(name: str, state: str = "all") -> list[str]:
    """Ids of the user's jobs of this name that wait or run, or only those in ``state``."""
    states = [] if state == "all" else ["-t", state]
    return call("squeue", "--me", "-h", *states, "-n", name, "-o", "%i").split()


def host_names(node_list: str) -> list[str]:
    """``n[1-3]`` as ``["n1", "n2", "n3"]``."""
    return insist("scontrol", "show", "hostnames", node_list).split()


def address(node: str) -> str:
    """The address of ``node``: its name, unless the cluster's configuration says otherwise."""
    return fields(insist("scontrol", "show", "node", "--oneliner", node)).get("NodeAddr", node)
