"""Checkpoints of a run: written by all ranks, named by rank 0 once they are whole, found again at the next start."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from nft_megatron.collect import CollectorState
from nft_megatron.errors import UserError
from nft_megatron.files import make_temporary_folder, publish_folder
from nft_megatron.model.checksums import DamagedCheckpointError
from nft_megatron.model.control import on_main, together
from nft_megatron.model.step import Trainer
from nft_megatron.run_folder import RunFolder

log = logging.getLogger(__name__)

_COLLECTOR = "collector.parquet"


@dataclass(frozen=True)
class Checkpoints:
    """Saves and restores trainer and collector together. Every method is called on all ranks."""

    folder: RunFolder
    trainer: Trainer
    num_kept: int

    def save(self, step: int, collector: CollectorState) -> None:
        """Write the checkpoint of ``step``, move the pointer to it, then delete all but the ``num_kept`` newest.

        Whatever fails, the pointer still names a whole checkpoint and nothing half-written is left.
        """
        topology = self.trainer.topology
        temporary = on_main(topology, lambda: make_temporary_folder(self.folder.checkpoint(step)))
        try:
            on_main(topology, lambda: collector.save(temporary / _COLLECTOR))
            together(topology, lambda: self.trainer.save(temporary, step))  # ends with checksums over all files
            on_main(topology, lambda: publish_folder(temporary, self.folder.checkpoint(step)))
        finally:
            if topology.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
        on_main(topology, lambda: self._keep_newest(step))

    def _keep_newest(self, step: int) -> None:
        self.folder.set_latest(step)
        for old in [other for other in self.folder.checkpoint_steps() if other <= step][: -self.num_kept]:
            shutil.rmtree(self.folder.checkpoint(old))

    def restore(self) -> tuple[int, CollectorState | None]:
        """Go back to the newest good checkpoint: its step (0 where there is none) and, on rank 0, the collector's state.

        That is the one which the pointer names; where it is missing or damaged, loudly the newest good one before it. The steps
        in between are trained again, from their ledgers. Raises :class:`UserError` when none of them is good.
        """
        newest = on_main(self.trainer.topology, self.folder.latest_step)
        if newest is None:
            return 0, None
        older = on_main(self.trainer.topology, self.folder.checkpoint_steps)
        problem: UserError | None = None
        for step in [newest, *reversed([step for step in older if step < newest])]:
            try:
                return step, self._restore(step)
            except DamagedCheckpointError as error:
                problem = problem or error
                if self.trainer.topology.is_main:
                    log.error("%s; trying the checkpoint before it", error)
        assert problem is not None
        raise problem

    def _restore(self, step: int) -> CollectorState | None:
        topology, path = self.trainer.topology, self.folder.checkpoint(step)
        together(topology, lambda: self._check_is_there(path))
        saved_step = self.trainer.load(path)
        assert saved_step == step, f"{path} holds step {saved_step}"
        return CollectorState.load(path / _COLLECTOR) if topology.is_main else None

    def _check_is_there(self, path: Path) -> None:
        if not path.is_dir():
            raise DamagedCheckpointError(
                "checkpoints/latest", path.name, "that checkpoint is not there",
                f"restore it, or write one of {self.folder.checkpoint_steps()} into {self.folder.latest}",
            )  # fmt: skip
