"""A port for a process that will bind it later."""

from __future__ import annotations

import contextlib
import random
import socket

_PORTS = range(15_000, 32_000)
"""Below those that the kernel hands out to whoever asks for any; Linux begins at 32,768."""
_ATTEMPTS = 100


def free_port(host: str = "") -> int:
    """A free port on ``host`` that the kernel gives to nobody, since its owner imports for half a minute before binding it.

    Raises:
        OSError: none of a hundred was free.

    >>> free_port("127.0.0.1") in range(15_000, 32_000)
    True
    """
    for _ in range(_ATTEMPTS):
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind((host, port))
            return port
    raise OSError(f"no free port between {_PORTS.start} and {_PORTS.stop} on {host or 'this machine'}")
