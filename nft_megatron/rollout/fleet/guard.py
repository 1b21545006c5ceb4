"""The parent of a vLLM server's processes: ``python guard.py DESCRIPTOR COMMAND…``, the leader of its own session.

vLLM is an API process, an engine process and workers; killing one leaves the others behind for half a minute, and killing the
trainer leaves all of them behind forever. This process waits until the API process ends, or the holder of the other end of the
pipe ``DESCRIPTOR`` is gone, and then kills its whole group, itself included. Standard library only.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

_POLL_MILLISECONDS = 200


def main(descriptor: int, command: list[str]) -> None:
    """Run ``command`` until it ends or the pipe closes, then kill the group. Never returns."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to the group: the server exits in its own time
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_default_signals)
    pipe = select.poll()  # select.select refuses descriptors above 1023
    pipe.register(descriptor, select.POLLIN)
    while server.poll() is None and not pipe.poll(_POLL_MILLISECONDS):
        pass
    print(f"guard: {'the parent is gone' if server.poll() is None else f'the server ended ({server.returncode})'}", flush=True)
    os.killpg(0, signal.SIGKILL)


def _default_signals() -> None:
    """Undo the ignored signals, which are inherited: the server must receive them."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
