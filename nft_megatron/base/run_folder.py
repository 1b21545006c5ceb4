"""Run-folder paths and lock."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from nft_megatron.base.atomic_io import atomic_file, remove_leftovers
from nft_megatron.base.deadline import Deadline
from nft_megatron.base.errors import StoppedEarly, UserError
from nft_megatron.base.file_lock import PASSING, leads_to, open_to_lock, try_to_lock
from nft_megatron.base.own_folder import ForeignFolderError, claim
from nft_megatron.base.untrusted import read_text

_LOCK_POLL_SECONDS = 0.5
TAKEN = "another process is training in it"
_STEP = re.compile(r"step_[0-9]{6,12}")


def _steps(names: Iterable[str]) -> list[int]:
    """The steps of the names that are ``step_`` and a number, sorted."""
    return sorted(int(name.removeprefix("step_")) for name in names if _STEP.fullmatch(name))


class RunFolderTakenError(UserError):
    """Another process is training in the folder."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. Step numbers count finished rollout steps: ``ledger(3)`` trains the weights of ``checkpoint(2)``
    into those of ``checkpoint(3)``.

    >>> RunFolder(Path("runs/a")).ledger(12).as_posix()
    'runs/a/ledger/step_000012.parquet'
    >>> RunFolder(Path("runs/a")).checkpoint(12).as_posix()
    'runs/a/checkpoints/step_000012'
    """

    root: Path
    _opened: list[IO[bytes]] = field(default_factory=list, init=False, repr=False, compare=False)
    """The lock file, once this process has opened it. While it is open, no other file gets its inode."""

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def prompts(self) -> Path:
        """The prompts that the run began with."""
        return self.root / "prompts.parquet"

    @property
    def algorithm(self) -> Path:
        """The import path of a user's own algorithm and the hash of its source."""
        return self.root / "algorithm.txt"

    @property
    def has_begun(self) -> bool:
        """Whether answers were collected or a checkpoint written: from then on, what the run computes may not change."""
        return bool(self.config.exists() and (self.latest_step() or any(self.ledgers.rglob("*.parquet"))))

    @property
    def stop(self) -> Path:
        """Written by a person or the scheduler: save and exit."""
        return self.root / "stop"

    @property
    def save_request(self) -> Path:
        """Written by a person or the scheduler: save after this step and continue; deleted once that is done."""
        return self.root / "save"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def latest(self) -> Path:
        """Holds the name of the newest complete checkpoint."""
        return self.checkpoints / "latest"

    @property
    def best(self) -> Path:
        """Holds the name of the checkpoint of the highest held-out accuracy, if ``checkpoint.keep_best`` asks for it."""
        return self.checkpoints / "best"

    @property
    def ledgers(self) -> Path:
        return self.root / "ledger"

    def ledger(self, step: int) -> Path:
        return self.ledgers / f"step_{step:06d}.parquet"

    @property
    def _rounds(self) -> Path:
        return self.ledgers / "rounds"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def end(self, rank: int) -> Path:
        """A rank's exit code and its cause; see :mod:`nft_megatron.lifecycle.exit_report`."""
        return self.logs / f"end_rank{rank}.json"

    def fault(self, rank: int) -> Path:
        """The traceback of a fault."""
        return self.logs / f"fault_rank{rank}.txt"

    @property
    def heartbeat(self) -> Path:
        """Touched by rank 0 as long as it lives: while the others wait for it, nobody else could tell."""
        return self.logs / "alive_rank0"

    def stall(self, rank: int) -> Path:
        """What a rank's watchdog leaves: the phase that hung, and the stacks."""
        return self.logs / f"stall_rank{rank}.txt"

    def phase(self, rank: int) -> Path:
        """The phase that a rank is in, and its stacks if C code hung; see :mod:`nft_megatron.lifecycle.backstop`."""
        return self.logs / f"phase_rank{rank}.txt"

    @property
    def probe(self) -> Path:
        """The engine's latest answers to the log-prob probe."""
        return self.ledgers / "gate.parquet"

    def round_part(self, step: int, round_index: int, part: int) -> Path:
        """Finished groups of a round of a step that is still being collected."""
        return self._rounds / f"step_{step:06d}_round_{round_index:02d}_part_{part:04d}.parquet"

    def round_parts(self, step: int, round_index: int) -> list[Path]:
        """The parts of a round that are on disk, in order.

        Earlier versions wrote a complete round as one file, which is then the only part that counts.
        """
        stem = f"step_{step:06d}_round_{round_index:02d}"
        whole = self._rounds / f"{stem}.parquet"
        return [whole] if whole.exists() else sorted(self._rounds.glob(f"{stem}_part_*.parquet"))

    def rounds(self, step: int) -> list[Path]:
        """The parts of all rounds of ``step`` that are on disk."""
        return sorted(self._rounds.glob(f"step_{step:06d}_round_*.parquet"))

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    def export(self, step: int) -> Path:
        """Hugging Face model folder of the weights after ``step``."""
        return self.root / "hf" / f"step_{step:06d}"

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint; None before the first.

        Raises :class:`UserError` if the pointer, which people may edit, names no step.
        """
        if not self.latest.exists():
            return None
        remedy = "write the name of one of the folders next to it into it"
        name = read_text(self.latest, "checkpoints/latest", remedy).strip()
        if not _STEP.fullmatch(name):
            raise UserError(
                str(self.latest),
                name,
                "is not the name of a checkpoint",
                f"write one of {[self.checkpoint(step).name for step in self.checkpoint_steps()]} into it",
            )
        return int(name.removeprefix("step_"))

    def set_latest(self, step: int) -> None:
        """Move the pointer; call only once the checkpoint is on disk."""
        with atomic_file(self.latest, make_folder=False) as temporary:
            temporary.write_text(self.checkpoint(step).name)

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a complete checkpoint, oldest first."""
        return _steps(folder.name for folder in self.checkpoints.glob("step_*"))

    def ledger_steps(self) -> list[int]:
        """Steps that have a ledger, oldest first."""
        return _steps(path.stem for path in self.ledgers.glob("step_*.parquet"))

    def export_steps(self) -> list[int]:
        """Steps that have an export, oldest first."""
        return _steps(folder.name for folder in (self.root / "hf").glob("step_*"))

    def open(self, wait_seconds: float = 0.0) -> IO[bytes]:
        """Create the folder, take its lock and delete what a killed process left. Keep the returned file open.

        Raises:
            RunFolderTakenError: another process is still training in this folder after ``wait_seconds``.
            ForeignFolderError: what lies there, or where its links lead, is not this run's.
            UserError: it cannot be written, or its file system has no locks.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            is_known = os.path.lexists(self._lock) or (self.config.exists() and self.ledgers.exists())
            lock = self._take(Deadline.of(wait_seconds))
            try:
                self._refuse_foreign(is_known)
            except BaseException:
                if not is_known:
                    self._lock.unlink(missing_ok=True)
                lock.close()
                raise
        except OSError as error:
            if error.errno in PASSING:
                raise
            problem = f"cannot be written ({error.filename}: {error.strerror})"
            raise UserError("run_dir", self.root, problem, "choose another folder") from error
        if is_known:
            for folder in self.folders:
                remove_leftovers(folder)
        self._opened[:] = [lock]
        return lock

    def make_folders(self) -> None:
        """Create the folders that a run writes into. Nothing creates them later: if one is missing, so is the run folder."""
        for folder in self.folders:
            folder.mkdir(exist_ok=True)

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that a run writes into: its own first, then those in it."""
        return self.root, self.logs, self.checkpoints, self.ledgers, self._rounds, self.root / "hf"

    def check_is_open(self) -> None:
        """Raise :class:`OSError` if the path no longer leads to the folder that this rank or another opened.

        Once a file system is unmounted, writes to its paths land in the empty mount point; and once the folder or its lock is
        deleted, another run may begin under the same name.
        """
        if not (leads_to(self._lock, self._opened[0]) if self._is_open_here else os.path.exists(self._lock)):
            raise OSError(errno.ESTALE, "the run folder has disappeared", str(self.root))

    @contextlib.contextmanager
    def expected(self) -> Iterator[None]:
        """The folder is open, by this rank or another. A failure inside the ``with`` block because the folder disappeared, such
        as a missing ledger, becomes :class:`StoppedEarly`.
        """
        with contextlib.ExitStack() as stack:
            if not self._is_open_here:
                with contextlib.suppress(OSError):
                    self._opened[:] = [stack.enter_context(self._lock.open("rb", buffering=0))]
            try:
                yield
            except StoppedEarly:
                raise
            except Exception as error:
                try:
                    self.check_is_open()
                except OSError:
                    raise StoppedEarly(
                        f"{self.root} has disappeared; once it is back, the same command resumes from its newest checkpoint"
                    ) from error
                raise

    @property
    def _lock(self) -> Path:
        return self.root / "lock"

    @property
    def _is_open_here(self) -> bool:
        return bool(self._opened) and not self._opened[0].closed

    def _take(self, deadline: Deadline) -> IO[bytes]:
        """The lock file, locked, once the path leads to it."""
        while True:
            lock = open_to_lock(self._lock)
            try:
                is_ours = try_to_lock(lock, "run_dir", self.root) and leads_to(self._lock, lock)
            except BaseException:
                lock.close()
                raise
            if is_ours:
                return lock
            lock.close()
            if deadline.has_passed:
                raise RunFolderTakenError("run_dir", self.root, TAKEN, "wait for it, stop it, or choose another folder")
            time.sleep(_LOCK_POLL_SECONDS)

    def _refuse_foreign(self, is_known: bool) -> None:
        """Raise :class:`ForeignFolderError` where files could be replaced or deleted that are not the run's."""
        if not is_known:
            for steps in (self.checkpoints, self.root / "hf"):
                if found := [path.name for path in steps.glob("step_*") if _STEP.fullmatch(path.name)]:
                    problem = f"holds no run, but {steps.name}/{min(found)}"
                    raise ForeignFolderError("run_dir", self.root, problem, "choose another folder, or move that away")
        for folder in self.folders[1:]:
            claim(folder, self.root)
