"""What happens to jobs in the night, done to a :class:`SlurmRun`: each function strikes once, and undoes what stays broken."""

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

from slurm.lab import variable
from slurm.runs import processes, words_of


def time_limit_near(run):
    """Slurm's USR1 to the batch script."""
    run.lab.run("scancel", "--signal=USR1", "--batch", run.job_id)


def preemption(run):
    """A job of the other partition takes all nodes for a moment."""
    other = run.lab.submit(
        "--partition=high", f"--nodes={len(run.lab.nodes)}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )
    run.lab.wait_state(other, "COMPLETED")


def first_node_lost(run):
    """Power loss where the agent and rank 0 are."""
    _lose(run, run.attempts[-1].nodes[0])


def trainer_node_lost(run):
    """Power loss of another trainer."""
    _lose(run, run.attempts[-1].nodes[1])


def _lose(run, node):
    attempt = run.attempts[-1].number
    run.lab.kill_node(node)
    run.lab.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=power")  # in place of SlurmdTimeout
    try:
        run.wait(lambda: run.attempts[-1].number > attempt or run.folder.end(), "no new attempt after a lost node")
    finally:
        run.lab.restore_node(node)


def rank_killed(run):
    os.kill(rank_process(run, 1), signal.SIGKILL)


def rank_0_killed(run):
    os.kill(rank_process(run, 0), signal.SIGKILL)


def rank_stopped(run):
    """It exists, and does nothing: the others wait for it in a collective."""
    os.kill(rank_process(run, 1), signal.SIGSTOP)


def rank_0_stopped(run):
    os.kill(rank_process(run, 0), signal.SIGSTOP)


def checkpoint_truncated(run):
    """And a crash, so that it is read."""
    with _newest_checkpoint(run) as folder:
        largest = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)


def checkpoint_bit_flipped(run):
    with _newest_checkpoint(run) as folder:
        path = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def checkpoint_half_deleted(run):
    with _newest_checkpoint(run) as folder:
        next(iter(sorted(folder.glob("*.distcp")))).unlink()


def disk_full(run):
    """For as long as it takes until an attempt ends of it. The run folder must be a small file system of its own."""
    attempt = run.attempts[-1].number
    ballast = run.root.parent / "ballast"
    try:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 20)):
                pass
        run.wait(lambda: _trainers_gone(run, attempt), "nobody noticed that the disk is full")
    finally:
        ballast.unlink()


def folder_away(run, seconds=30):
    """The shared folder answers nothing for a while: its name leads nowhere."""
    aside = run.root.with_name(run.root.name + ".away")
    os.rename(run.root, aside)
    time.sleep(seconds)
    if run.root.exists():  # somebody began a new one in its place
        shutil.rmtree(run.root)
    os.rename(aside, run.root)


class _newest_checkpoint:
    """The newest checkpoint with the ranks stopped, so that it stays the newest; afterwards they are killed."""

    def __init__(self, run):
        self._run = run

    def __enter__(self) -> Path:
        self._ranks = [rank_process(self._run, rank) for rank in (0, 1)]
        for process in self._ranks:
            os.kill(process, signal.SIGSTOP)
        return self._run.folder.run.checkpoint(self._run.folder.run.latest_step())

    def __exit__(self, *exception):
        for process in self._ranks:
            os.kill(process, signal.SIGKILL)


def rank_process(run, rank) -> int:
    """The process of a rank of the running attempt, waited for if it is about to start."""
    return run.wait(lambda: _find_rank(run, rank), f"no process of rank {rank}")


def _find_rank(run, rank) -> int | None:
    for process in processes():
        if variable(process, "SLURM_PROCID") == str(rank) and variable(process, "SLURM_JOB_ID") == run.job_id:
            words = words_of(process)
            if b"nft_megatron" in words and b"train" in words:
                return process
    return None


def _trainers_gone(run, attempt) -> bool:
    return run.attempts[-1].number > attempt or (_find_rank(run, 0) is None and _find_rank(run, 1) is None)


QUICK = (time_limit_near, rank_killed, rank_0_killed, checkpoint_truncated, checkpoint_bit_flipped, checkpoint_half_deleted)
SLOW = (preemption, first_node_lost, trainer_node_lost, rank_stopped, rank_0_stopped, disk_full, folder_away)


def random_incident(generator: random.Random):
    """One of all, each as likely as another."""
    return generator.choice(QUICK + SLOW)
