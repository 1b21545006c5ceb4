"""Locks of files: held by one process until it closes the file or ends, on any machine that sees the file system."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import IO, Any

from nft_megatron.base.errors import UserError

PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN)
"""Errors of a file system that can be temporary."""


def open_to_lock(path: Path) -> IO[bytes]:
    """The regular file ``path``, created if it is missing. It is never truncated, and a link is not followed.

    Raises :class:`OSError` if it is anything else.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return os.fdopen(descriptor, "r+b", buffering=0)


def try_to_lock(file: IO[Any], field: str, path: Path) -> bool:
    """Whether ``file``, which lies in ``path``, is now locked; False if another process holds the lock.

    Raises:
        UserError: naming ``field`` and ``path`` if the file system has no locks: without them two processes would write there.
        OSError: the file system cannot be reached.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in PASSING:
            raise
        remedy = "mount its file system with locks (Lustre: -o flock; NFS: a lock service), or choose a folder on another"
        raise UserError(field, path, f"cannot be locked: {error.strerror}", remedy) from error
    return True


def leads_to(path: Path, file: IO[Any]) -> bool:
    """Whether ``path`` is the open ``file``: the same device and inode, not merely a file of that name."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(file.fileno()))
    except OSError:
        return False
