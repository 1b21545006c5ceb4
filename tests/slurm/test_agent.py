"""The agent without a cluster: srun is a stub, the job a record of what was asked of it."""

import argparse
import errno
import signal
import time
from dataclasses import replace

import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.cli import slurm as command
from nft_megatron.config.load import load_config
from nft_megatron.slurm import agent, job_folder
from nft_megatron.slurm.job import Job
from nft_megatron.slurm.job_folder import JobFolder

requeued = []


class RecordedJob(Job):
    def requeue(self, excluded):
        requeued.append(sorted(excluded))


@pytest.fixture
def conduct(run_config, tmp_path, monkeypatch):
    """Runs one attempt on n1 and n2 whose srun is this line of shell, and returns the folder of the run's jobs."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    requeued.clear()
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    monkeypatch.setenv("PATH", str(srun.parent), prepend=":")
    monkeypatch.setattr(agent, "address", lambda node: node)
    config = load_config(run_config(cluster={"trainer_nodes": 2, "gpus_per_node": 1}, slurm={"gres": ""}))
    folder = JobFolder(RunFolder(config.run_dir))
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)

    def run(script):
        srun.write_text(f"#!/bin/sh\n{script}\n")
        srun.chmod(0o755)
        agent.Agent(config, RecordedJob("7", ("n1", "n2"), 8, time.time() + 3600)).conduct()
        return folder

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


SAYS = 'for word; do case $word in */preflight) echo {\\"problems\\": []} >$word/n1.json;; esac; done'


@pytest.mark.parametrize("code", [128 + number for number in (signal.SIGTERM, signal.SIGUSR1)])
def test_a_preflight_that_was_asked_to_end_is_never_counted(conduct, code):
    for _ in range(4):
        folder = conduct(f"exit {code}")
    assert [attempt.kind for attempt in folder.attempts()] == ["left"] * 4
    assert requeued == [[]] * 4


@pytest.mark.parametrize("code", [128 + number for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGKILL)])
def test_a_preflight_that_crashes_is_a_failure_and_its_node_a_bad_one(conduct, code):
    folder = conduct(f"{SAYS}; exit {code}")
    assert requeued == [["n2"]]
    conduct(f"exit {code}")
    conduct(f"exit {code}")
    with pytest.raises(UserError, match="no node wrote to the shared folder"):
        conduct(f"exit {code}")
    assert [attempt.kind for attempt in folder.attempts()] == ["bad nodes", "failed", "failed", "failed"]
    assert folder.attempts()[0].blamed == ("n2",)
    assert folder.end()[0] == "fatal"


@pytest.fixture
def full_disk(monkeypatch):
    """Atomic files fail for lack of space the given number of times; without a number, forever."""
    write = agent.atomic_file

    def fill(failures=None):
        left = iter(range(failures)) if failures is not None else None

        def atomic_file(path, **options):
            if left is None or next(left, None) is not None:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return write(path, **options)

        for module in (agent, job_folder):
            monkeypatch.setattr(module, "atomic_file", atomic_file)

    monkeypatch.setattr(agent, "_FOLDER_SECONDS", 0.5)
    monkeypatch.setattr(agent, "_FOLDER_PAUSE", 0.05)
    return fill


def test_a_job_that_begins_on_a_full_disk_is_requeued(conduct, full_disk):
    folder = conduct("exit 143")
    folder.save_attempt(replace(folder.attempts()[0], kind=None))  # to be closed by the next one
    full_disk()
    conduct("exit 143")
    assert requeued == [[], []]
    assert [attempt.kind for attempt in folder.attempts()] == [None]


def test_a_job_that_begins_on_a_full_disk_continues_once_there_is_room(conduct, full_disk):
    full_disk(failures=3)
    assert [attempt.kind for attempt in conduct("exit 143").attempts()] == ["left"]


def test_a_job_that_begins_again_waits_for_its_folder_and_makes_no_new_one(conduct, full_disk, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    folder = conduct("exit 143")
    assert requeued == [[]]
    assert not folder.run.root.exists()


@pytest.mark.parametrize("restarts", ["0", "2"])
def test_a_job_whose_configuration_stays_away_is_requeued_if_it_was_ever_there(tmp_path, monkeypatch, restarts):
    requeued.clear()
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    monkeypatch.setattr(command, "_CONFIG_SECONDS", 0.1)
    monkeypatch.setattr(Job, "here", lambda: RecordedJob("7", ("n1",), 8, time.time() + 3600))
    options = argparse.Namespace(config=tmp_path / "away" / "config.yaml", overrides=[], rollouts_only=False)
    if restarts == "0":
        with pytest.raises(UserError, match="no such file"):
            command._agent(options)
    else:
        command._agent(options)
    assert requeued == ([[]] if restarts == "2" else [])
