"""A file that a process touches as long as it lives.

A stopped or starved process is silent, and a process that waits for it with a deadline of hours cannot tell. The agent of a
Slurm job watches rank 0's file.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from nft_megatron.base.rank_info import rank_info
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.config.schema import Config

EVERY_SECONDS = 5.0


@contextlib.contextmanager
def alive(config: Config) -> Iterator[None]:
    """Rank 0 touches its file inside the ``with`` block, even while it tears a run down."""
    heartbeat = Heartbeat(RunFolder(config.run_dir).heartbeat) if rank_info().rank == 0 else None
    try:
        yield
    finally:
        if heartbeat is not None:
            heartbeat.close()


class Heartbeat:
    """Touches ``path`` until closed, in its own thread because the folder may hang. Does not create a missing folder."""

    def __init__(self, path: Path, every: float = EVERY_SECONDS) -> None:
        self._path, self._every = path, every
        self._closed = threading.Event()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _beat(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                self._path.touch()
            if self._closed.wait(self._every):
                return
