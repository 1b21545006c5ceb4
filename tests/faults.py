"""Faults that the real components do not produce on demand."""

import itertools
import os
from pathlib import Path
from unittest import mock

from dying import Dying
from torch.distributed.checkpoint import FileSystemWriter
from waiting import until

from nft_megatron.base.errors import StoppedEarly
from nft_megatron.base.rank_info import rank_info
from nft_megatron.cli.main import main
from nft_megatron.lifecycle.walltime import TimeLimit
from nft_megatron.model import objective
from nft_megatron.model.step import Trainer
from nft_megatron.rollout.embedded import EmbeddedEngine


def train_with_broken_update(config: str) -> None:
    """``nft-megatron train`` whose second update raises."""
    update, calls = Trainer.update, []

    def broken(self, minibatch):
        calls.append(minibatch)
        if len(calls) == 2:
            raise RuntimeError("the second update broke")
        return update(self, minibatch)

    with mock.patch.object(Trainer, "update", broken):
        main(["train", config])


def train_without_locks(config: str, number: int) -> None:
    """``nft-megatron train`` on a file system whose locks fail with error ``number``, as on Lustre mounted without them."""
    with mock.patch("fcntl.flock", side_effect=OSError(number, os.strerror(number))):
        main(["train", config])


def train_with_infinite_loss(config: str, *numbers: int) -> None:
    """``nft-megatron train`` in which the updates ``numbers`` (from 1) have an infinite loss but finite gradients."""
    update, measure, calls = Trainer.update, objective.measure, []

    def counted(self, minibatch):
        calls.append(minibatch)
        return update(self, minibatch)

    def infinite(*arguments):
        measured = measure(*arguments)
        return measured._replace(right=measured.right + float("inf")) if len(calls) in numbers else measured

    with mock.patch.object(Trainer, "update", counted), mock.patch.object(objective, "measure", infinite):
        main(["train", config])


def train_with_ticks(config: str, end: float) -> None:
    """``nft-megatron train`` whose job ends at ``end`` by a clock that ticks whenever it is read."""
    ticks = itertools.count()
    limit = TimeLimit(end, 3.0, clock=lambda: float(next(ticks)))
    with mock.patch.object(TimeLimit, "of_job", return_value=limit):
        main(["train", config])


def train_without_servers(config: str, version: int) -> None:
    """``nft-megatron train`` whose engine ends in vain to wait for servers when it is given the weights of ``version``."""
    load = EmbeddedEngine.load

    def wait(self, tensors, number):
        fingerprint = load(self, tensors, number)
        if number == version:
            raise StoppedEarly("stopped by SIGTERM while waiting for servers (0 of 1)")
        return fingerprint

    with mock.patch.object(EmbeddedEngine, "load", wait):
        main(["train", config])


def train_in_environment(config: str, variables: dict[str, str]) -> None:
    """``nft-megatron train`` with more environment variables."""
    os.environ.update(variables)
    main(["train", config])


def train_dying(config: str, root: str, moment: int, counted: str) -> None:
    """``nft-megatron train`` that is killed at its operation number ``moment`` on files under ``root``.

    0: never; ``counted`` then gets their number.
    """
    dying = Dying(root, moment)
    try:
        main(["train", config])
    finally:  # the command leaves by an exception
        Path(counted).write_text(str(dying.count))


def train_with_slow_writer(config: str, continue_file: str, fault: dict[str, int]) -> None:
    """``nft-megatron train`` that writes no shard of step 2 until the file ``continue_file`` exists.

    ``fault``: with "rank", "step" and "errno", that rank then fails to write that step; with "broken_update", that update
    raises.
    """
    write_data, update, calls = FileSystemWriter.write_data, Trainer.update, []

    def slow(self, plan, planner):
        step = int(Path(self.fs.concat_path(self.path, "")).name.rpartition("_")[2])
        wait_for_file = step == 2 or "broken_update" in fault
        if wait_for_file:
            until(lambda: os.path.exists(continue_file))
        if (rank_info().rank, step) == (fault.get("rank"), fault.get("step")):
            raise OSError(fault["errno"], os.strerror(fault["errno"]))
        return write_data(self, plan, planner)

    def broken(self, minibatch):
        calls.append(minibatch)
        if len(calls) == fault.get("broken_update"):
            raise RuntimeError("this update broke")
        return update(self, minibatch)

    with mock.patch.object(FileSystemWriter, "write_data", slow), mock.patch.object(Trainer, "update", broken):
        main(["train", config])
