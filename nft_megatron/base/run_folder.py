"""Where everything of a run lies, and the lock that keeps a second process out of it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nft_megatron.base.atomic_io import atomic_file, remove_leftovers
from nft_megatron.base.deadline import Deadline
from nft_megatron.base.errors import StoppedEarly, UserError

_LOCK_POLL_SECONDS = 0.5
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN)
"""What befalls a file system for a while."""
TAKEN = "another process is training in it"
_STEP = re.compile(r"step_\d{6,}")


class RunFolderTakenError(UserError):
    """Another process trains in the folder."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. Step numbers count finished rollout steps: ``ledger(3)`` trains the weights from ``checkpoint(2)``
    to those of ``checkpoint(3)``.

    >>> RunFolder(Path("runs/a")).ledger(12).as_posix()
    'runs/a/ledger/step_000012.parquet'
    >>> RunFolder(Path("runs/a")).checkpoint(12).as_posix()
    'runs/a/checkpoints/step_000012'
    """

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def stop(self) -> Path:
        """Written by a person or the scheduler: save and leave."""
        return self.root / "stop"

    @property
    def save_request(self) -> Path:
        """Written by a person or the scheduler: save after this step and go on; it disappears once that is done."""
        return self.root / "save"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def latest(self) -> Path:
        """Holds the name of the newest whole checkpoint."""
        return self.checkpoints / "latest"

    @property
    def ledgers(self) -> Path:
        return self.root / "ledger"

    def ledger(self, step: int) -> Path:
        return self.ledgers / f"step_{step:06d}.parquet"

    def ledger_round(self, step: int, round_index: int) -> Path:
        """One finished round of a step that is still being collected."""
        return self.ledgers / "rounds" / f"step_{step:06d}_round_{round_index:02d}.parquet"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def end(self, rank: int) -> Path:
        """The code with which a rank ended, and the cause; see :mod:`nft_megatron.lifecycle.exit_report`."""
        return self.logs / f"end_rank{rank}.json"

    def fault(self, rank: int) -> Path:
        """The traceback of a fault."""
        return self.logs / f"fault_rank{rank}.txt"

    @property
    def heartbeat(self) -> Path:
        """Touched by rank 0 as long as it lives: while the others wait for it nobody else could tell."""
        return self.logs / "alive_rank0"

    def stall(self, rank: int) -> Path:
        """What the watchdog of a rank leaves: the phase that stood still, and where."""
        return self.logs / f"stall_rank{rank}.txt"

    @property
    def gate(self) -> Path:
        """The engine's last answers to the fixed questions."""
        return self.ledgers / "gate.parquet"

    def round_part(self, step: int, round_index: int, part: int) -> Path:
        """Some finished groups of a round under way."""
        whole = self.ledger_round(step, round_index)
        return whole.with_name(f"{whole.stem}_part_{part:04d}.parquet")

    def round_parts(self, step: int, round_index: int) -> list[Path]:
        """The parts of a round that are on the disk, in order."""
        whole = self.ledger_round(step, round_index)
        return sorted(whole.parent.glob(f"{whole.stem}_part_*.parquet"))

    def rounds(self, step: int) -> list[Path]:
        """The rounds of ``step`` that are on the disk, whole and in parts."""
        return sorted((self.ledgers / "rounds").glob(f"step_{step:06d}_round_*.parquet"))

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    def export(self, step: int) -> Path:
        """Hugging Face model folder of the weights after ``step``."""
        return self.root / "hf" / f"step_{step:06d}"

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, None before the first.

        Raises :class:`UserError` when the pointer, which people may edit, names no step.
        """
        if not self.latest.exists():
            return None
        name = self.latest.read_text().strip()
        if not _STEP.fullmatch(name):
            raise UserError(
                str(self.latest),
                name,
                "is not the name of a checkpoint",
                f"write one of {[self.checkpoint(step).name for step in self.checkpoint_steps()]} into it",
            )
        return int(name.removeprefix("step_"))

    def set_latest(self, step: int) -> None:
        """Move the pointer; to be called only once the checkpoint is on the disk."""
        with atomic_file(self.latest, make_folder=False) as temporary:
            temporary.write_text(self.checkpoint(step).name)

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a whole checkpoint, oldest first."""
        names = (folder.name for folder in self.checkpoints.glob("step_*"))
        return sorted(int(name.removeprefix("step_")) for name in names if _STEP.fullmatch(name))

    def open(self, wait_seconds: float = 0.0) -> IO[str]:
        """Make the folder, take its lock and clear what a killed process left. Keep the returned file open.

        Raises :class:`RunFolderTakenError` when another process still trains in this folder after ``wait_seconds``.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = self._lock.open("w")
        except OSError as error:
            if error.errno in PASSING:
                raise
            raise UserError("run_dir", self.root, f"cannot be written: {error.strerror}", "choose another folder") from error
        self._take(lock, Deadline.of(wait_seconds))
        for folder in self._folders:
            remove_leftovers(folder)
        return lock

    def make_folders(self) -> None:
        """What a run writes into. Nothing makes them later: where they are missing then, the whole run folder is."""
        for folder in self._folders:
            folder.mkdir(exist_ok=True)

    @property
    def _folders(self) -> tuple[Path, ...]:
        return self.root, self.logs, self.checkpoints, self.ledgers, self.ledgers / "rounds", self.root / "hf"

    def check_is_open(self) -> None:
        """Raise :class:`OSError` when a folder that was opened, by this rank or another, is not what stands under its name now.

        Where a file system is mounted no more, what is written to its paths lands in the empty folder below.
        """
        if not os.path.exists(self._lock):
            raise OSError(errno.ESTALE, "the run folder has gone away", str(self.root))

    @contextlib.contextmanager
    def expected(self) -> Iterator[None]:
        """The folder is open. What fails inside the ``with`` block for want of it, such as a ledger that is not found, ends as
        :class:`StoppedEarly`.
        """
        try:
            yield
        except StoppedEarly:
            raise
        except Exception as error:
            try:
                self.check_is_open()
            except OSError:
                raise StoppedEarly(
                    f"{self.root} has gone away; the same command goes on from its newest checkpoint once it is back"
                ) from error
            raise

    @property
    def _lock(self) -> Path:
        return self.root / "lock"

    def _take(self, lock: IO[str], deadline: Deadline) -> None:
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if deadline.has_passed:
                    lock.close()
                    raise RunFolderTakenError(
                        "run_dir",
                        self.root,
                        TAKEN,
                        "wait for it, stop it, or choose another folder",
                    ) from error
            time.sleep(_LOCK_POLL_SECONDS)
