"""The folder of a conversion under way, ``NAME.partial``, and what has been done in it.

A line is added to its journal after each tensor. Started again with the same source and options, a conversion takes up the
folder and checks what the journal says by reading it back; for anything else it begins anew.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nft_megatron.base.atomic_io import fsync_path, publish_folder
from nft_megatron.base.errors import UserError

_JOURNAL = "journal.jsonl"


class PartialFolder:
    """A context manager that holds the folder for one process.

    ``done`` is what was recorded by an earlier process of the same ``identity``: tensor name → record. Of what such a process
    has left, only ``identity["files"]`` are taken up, those with tensors.

    Raises:
        UserError: when the final name is taken or another process is at work.
        OSError: when the disk has not ``num_bytes`` left.
    """

    def __init__(self, final: Path, identity: Mapping[str, Any], num_bytes: int) -> None:
        if final.exists():
            raise UserError("DST", final, "exists already", "give another name, or move it away")
        self._final, self._identity = final, json.loads(json.dumps(identity))
        self.path = partial_path(final)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._journal = (self.path / _JOURNAL).open("a+")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._journal.close()
            raise UserError("DST", final, "is being written by another process", "wait for it, or give another name") from error
        self.done: Mapping[str, Mapping[str, Any]] = self._take_up()
        self._refuse_full_disk(num_bytes)

    def __enter__(self) -> PartialFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._journal.close()
        if isinstance(error, UserError):  # with a source that is wrong there is nothing to go on with
            shutil.rmtree(self.path)

    def record(self, name: str, values: Mapping[str, Any]) -> None:
        """Note that a tensor is written."""
        with self._lock:
            self._journal.write(json.dumps({"tensor": name, **values}) + "\n")
            self._journal.flush()

    def publish(self) -> None:
        """Flush all and give it its final name."""
        for path in self.path.iterdir():  # before the journal goes: without it all would be done again
            fsync_path(path)
        (self.path / _JOURNAL).unlink()
        publish_folder(self.path, self._final)

    def _take_up(self) -> dict[str, Mapping[str, Any]]:
        self._journal.seek(0)
        lines = []
        for line in self._journal:
            try:
                lines.append(json.loads(line))
            except ValueError:
                break  # the process died while it wrote this one
        is_same = bool(lines) and lines[0] == self._identity
        good = lines if is_same else [self._identity]
        kept = {_JOURNAL, *(self._identity["files"] if is_same else ())}
        for path in self.path.iterdir():
            if path.name not in kept:  # another conversion's, or what an earlier process wrote in its last moments
                shutil.rmtree(path) if path.is_dir() else path.unlink()
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
    """Where a conversion to ``final`` is prepared: beside it, so that the last rename never crosses a file system."""
    return final.parent / f"{final.name}.partial"
