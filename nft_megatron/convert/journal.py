"""The folder of a conversion in progress, ``NAME.partial``, and its journal.

The journal gains a line after each tensor. Restarted with the same source and options, a conversion resumes in the folder and
verifies the journal's tensors by reading them back; with any other it starts over.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nft_megatron.base.atomic_io import fsync_path, publish_folder, remove
from nft_megatron.base.errors import UserError
from nft_megatron.base.file_lock import leads_to, try_to_lock
from nft_megatron.base.untrusted import parse_json
from nft_megatron.convert.manifest import NAME as MANIFEST

_JOURNAL = "journal.jsonl"


class PartialFolder:
    """A context manager that locks the folder for one process.

    ``done`` is what an earlier process of the same ``identity`` recorded: tensor name → record. Of the files that process
    left, only ``identity["files"]``, those with tensors, are reused.

    Raises:
        UserError: if the final name is taken, another process is working on it, or something else has the folder's name.
        OSError: if the disk has less than ``num_bytes`` left.
    """

    def __init__(self, final: Path, identity: Mapping[str, Any], num_bytes: int) -> None:
        if final.exists():
            raise UserError("DST", final, "already exists", "give another name, or move it away")
        self._final, self._identity = final, json.loads(json.dumps(identity))
        self.path = partial_path(final)
        if self.path.is_symlink() or (self.path.exists() and not self._is_of_a_conversion()):
            raise UserError("DST", self.path, "is in the way, and no conversion's", "move it away, or give another name")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._journal = (self.path / _JOURNAL).open("a+")
        try:
            if not (try_to_lock(self._journal, "DST", final) and leads_to(self.path / _JOURNAL, self._journal)):
                raise UserError("DST", final, "is being written by another process", "wait for it, or give another name")
        except BaseException:
            self._journal.close()
            raise
        self.done: Mapping[str, Mapping[str, Any]] = self._take_up()
        self._refuse_full_disk(num_bytes)

    def _is_of_a_conversion(self) -> bool:
        """Only then may what lies in the folder be deleted. Its journal goes just before it gets its final name."""
        names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else {""}
        return not names or _JOURNAL in names or MANIFEST in names

    def __enter__(self) -> PartialFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._journal.close()
        if isinstance(error, UserError):  # a wrong source leaves nothing to resume
            shutil.rmtree(self.path)

    def record(self, name: str, values: Mapping[str, Any]) -> None:
        """Record that a tensor is written."""
        with self._lock:
            self._journal.write(json.dumps({"tensor": name, **values}) + "\n")
            self._journal.flush()

    def publish(self) -> None:
        """Flush everything and rename the folder to its final name."""
        for path in self.path.iterdir():  # before deleting the journal: without it everything would be redone
            fsync_path(path)
        (self.path / _JOURNAL).unlink()
        publish_folder(self.path, self._final)

    def _take_up(self) -> dict[str, Mapping[str, Any]]:
        self._journal.seek(0)
        lines = []
        for line in self._journal:
            try:
                lines.append(parse_json(line))
            except ValueError:
                break  # the process died while writing this line
        is_same = bool(lines) and lines[0] == self._identity
        good = lines if is_same else [self._identity]
        kept = {_JOURNAL, *(self._identity["files"] if is_same else ())}
        for path in self.path.iterdir():
            if path.name not in kept:  # another conversion's, or an earlier process's last writes
                remove(path)
        self._journal.truncate(0)
        self._journal.writelines(json.dumps(line) + "\n" for line in good)
        self._journal.flush()
        return {line.pop("tensor"): line for line in good[1:]}

    def _refuse_full_disk(self, num_bytes: int) -> None:
        taken = sum(path.stat().st_blocks * 512 for path in self.path.iterdir())
        free = shutil.disk_usage(self.path).free
        if free + taken < num_bytes:
            text = f"{os.strerror(errno.ENOSPC)}: {num_bytes - taken:,} bytes are needed, {free:,} are free"
            raise OSError(errno.ENOSPC, text, str(self.path))


def partial_path(final: Path) -> Path:
    """Where a conversion to ``final`` is prepared: next to it, so that the final rename never crosses file systems."""
    return final.parent / f"{final.name}.partial"
