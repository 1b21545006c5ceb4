"""Checkpoints of a run: written by all ranks, published by rank 0 once complete, found again at the next start."""

from __future__ import annotations

import functools
import logging
import shutil
import time
from concurrent.futures import Future, wait
from pathlib import Path

from nft_megatron.base.atomic_io import make_temporary_folder, publish_folder
from nft_megatron.base.background import in_background
from nft_megatron.base.errors import UserError
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.collect.collector import CollectorState
from nft_megatron.model.checkpoint import Snapshot
from nft_megatron.model.checksums import DamagedCheckpointError
from nft_megatron.model.control import first_of, on_main, together
from nft_megatron.model.step import Trainer
from nft_megatron.model.topology import Topology, with_own_control_group
from nft_megatron.run.retention import remove_old_checkpoints, remove_old_ledgers

log = logging.getLogger(__name__)

COLLECTOR = "collector.parquet"
_GRACE_SECONDS = 60.0


class Checkpoints:
    """Saves and restores trainer and collector together. Every method is called on all ranks. ``num_ledgers_kept`` None: all.

    ``asynchronous``: a thread on each rank writes while training continues. It has its own control group, with the deadline
    ``deadline_seconds``, so that its messages and those of the main thread never mix.
    """

    def __init__(
        self,
        folder: RunFolder,
        trainer: Trainer,
        num_kept: int,
        *,
        num_best: int = 0,
        num_ledgers_kept: int | None = None,
        asynchronous: bool,
        deadline_seconds: float,
    ) -> None:
        self._folder, self._trainer, self._num_kept = folder, trainer, num_kept
        self._num_best, self._num_ledgers_kept = num_best, num_ledgers_kept
        self._topology = trainer.topology
        self._of_writer = with_own_control_group(self._topology, deadline_seconds) if asynchronous else None
        self._pending: Future[float] | None = None

    def save(self, step: int, collector: CollectorState) -> None:
        """Start the checkpoint of ``step``. It exists once :meth:`finish` has returned.

        Once it is written, the pointer moves to it, then all but the ``num_kept`` newest and the ``num_best`` best are deleted,
        then old ledgers.
        Whatever fails, the pointer still names a complete checkpoint and nothing half-written is left.
        """
        assert self._pending is None, "finish() the previous one first"
        begin = time.monotonic()
        snapshot = self._trainer.snapshot(step)
        write = functools.partial(self._write, snapshot, step, collector, self._of_writer or self._topology, begin)
        if self._of_writer is not None:
            self._pending = in_background("save", write)
        else:
            self._pending = Future()
            self._pending.set_result(write())

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint waits for :meth:`finish`."""
        return self._pending is not None

    def is_written(self) -> bool:
        """Whether a checkpoint is pending that :meth:`finish` would return at once on every rank."""
        if self._pending is None:
            return False
        return first_of(self._topology, None if self._pending.done() else "writing") is None

    def finish(self) -> float:
        """Wait for the pending checkpoint and return the seconds it took.

        Raises :class:`OSError` on every rank if any of them could not write.
        """
        pending, self._pending = self._pending, None
        assert pending is not None
        return together(self._topology, pending.result)

    def close(self) -> None:
        """Close after a fault, on this rank alone: a pending checkpoint gets a little time."""
        if self._pending is not None:
            wait([self._pending], _GRACE_SECONDS)

    def _write(self, snapshot: Snapshot, step: int, collector: CollectorState, topology: Topology, begin: float) -> float:
        target = self._folder.checkpoint(step)
        temporary = on_main(topology, lambda: make_temporary_folder(target, make_parent=False))
        try:
            on_main(topology, lambda: collector.save(temporary / COLLECTOR))
            snapshot.write(temporary, topology)  # ends with checksums over all files
            on_main(topology, lambda: self._publish(temporary, target))
        finally:
            if topology.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
        on_main(topology, lambda: self._keep_newest(step))
        return time.monotonic() - begin

    def _publish(self, temporary: Path, target: Path) -> None:
        self._folder.check_is_open()
        publish_folder(temporary, target)

    def _keep_newest(self, step: int) -> None:
        self._folder.check_is_open()
        self._folder.set_latest(step)
        remove_old_checkpoints(self._folder, step, self._num_kept, self._num_best)
        remove_old_ledgers(self._folder, step, self._num_ledgers_kept, self._num_kept)

    def restore(self) -> tuple[int, CollectorState | None]:
        """Restore the newest good checkpoint: returns its step (0 if there is none) and, on rank 0, the collector's state.

        That is the one which the pointer names; if it is missing or damaged, the newest good one before it, with an error
        logged. The steps in between are retrained from their ledgers. Raises :class:`UserError` if none of them is good.
        """
        newest = on_main(self._topology, self._folder.latest_step)
        if newest is None:
            return 0, None
        older = on_main(self._topology, self._folder.checkpoint_steps)
        problem: UserError | None = None
        for step in [newest, *reversed([step for step in older if step < newest])]:
            try:
                return step, self._restore(step)
            except DamagedCheckpointError as error:
                problem = problem or error
                if self._topology.is_main:
                    log.error("%s; trying the previous checkpoint", error)
        assert problem is not None
        raise problem

    def _restore(self, step: int) -> CollectorState | None:
        topology, path = self._topology, self._folder.checkpoint(step)
        together(topology, lambda: self._check_is_there(path))
        saved_step = self._trainer.load(path)
        if saved_step != step:
            raise UserError(
                "checkpoints/latest", path.name, f"that folder holds step {saved_step}", "give folders their own names"
            )
        if not topology.is_main:
            return None
        state = path / COLLECTOR  # a fork that asks other questions has none; checksums know of it
        return CollectorState.load(state) if state.exists() else CollectorState()

    def _check_is_there(self, path: Path) -> None:
        if not path.is_dir():
            raise DamagedCheckpointError(
                "checkpoints/latest",
                path.name,
                "that checkpoint does not exist",
                f"restore it, or write one of {self._folder.checkpoint_steps()} into {self._folder.latest}",
            )
