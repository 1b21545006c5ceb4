"""The grader processes of a verifier, found through /proc."""

import contextlib
import os
import signal
from pathlib import Path


def workers_of(parent: int) -> list[int]:
    """Process ids of the graders that ``parent`` started and that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, ppid = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(ppid) == parent and state != "Z" and b"nft_megatron.verify.worker" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def kill_workers() -> set[int]:
    """Those that it killed."""
    pids = set(workers_of(os.getpid()))
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return pids
