"""Parent of everything in one :class:`lab.Lab`: no daemon, no step and no task outlives the process that began it.

Reads one JSON object a line, ``{"command": [...], "env": {...}, "log": path}``, and starts it. Descendants that leave their
own parent, as slurmstepd does, become children of this process (a subreaper), so that all of them can be found. When the input
ends or the parent is gone, all are killed and the folder given as the argument is removed.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import sys
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def descendants(root: int) -> set[int]:
    """The living processes below ``root``, without itself."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # ended meanwhile
            continue
        if state not in "ZX":
            children.setdefault(int(parent), []).append(int(folder.name))
    found: set[int] = set()
    queue = list(children.get(root, ()))
    while queue:
        found.add(process := queue.pop())
        queue += children.get(process, ())
    return found


def kill(processes: set[int]) -> None:
    """SIGKILL to those that still are."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the tests
    parent = os.getppid()
    try:
        buffer = b""
        while os.getppid() == parent:
            if not select.select([0], [], [], 0.5)[0]:
                continue
            if not (data := os.read(0, 65536)):
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                order = json.loads(line)
                output = [(os.POSIX_SPAWN_OPEN, 1, order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)]
                output += [(os.POSIX_SPAWN_DUP2, 1, 2), (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
                os.posix_spawnp(
                    order["command"][0],
                    order["command"],
                    order["env"],
                    file_actions=output,
                    setsid=True,
                    setsigdef=[signal.SIGCHLD, signal.SIGINT],
                )
    finally:
        while processes := descendants(os.getpid()):
            kill(processes)
        shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
