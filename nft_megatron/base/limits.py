"""Limits of the machine or the account that end a command: memory, processes, open files."""

from __future__ import annotations

import errno

_FILES = "too many open files; raise the limit (`ulimit -n`)"
_PROCESSES = "no further process or thread could be started; raise the limit (`ulimit -u`), or use fewer workers and threads"
_MEMORY = "out of memory; raise the limit (`ulimit -v`, Slurm's --mem), or lower rollout.batch_size or train.micro_batch_tokens"
_DEVICE = "out of GPU memory; lower train.micro_batch_tokens, set model.recompute, or use more GPUs (`nft-megatron plan`)"
_BY_NUMBER = {errno.EMFILE: _FILES, errno.ENFILE: _FILES, errno.EAGAIN: _PROCESSES, errno.ENOMEM: _MEMORY}
_BY_TEXT = {
    "can't start new thread": _PROCESSES,
    "DefaultCPUAllocator: can't allocate memory": _MEMORY,  # a RuntimeError of torch
    "cannot allocate memory": _MEMORY,
    "failed to map segment": _MEMORY,  # a library that was to be imported
    "Too many open files": _FILES,
}


def limit_reached(error: BaseException | None) -> str | None:
    """The limit at the root of ``error`` and its remedy; None if it has another cause.

    >>> limit_reached(OSError(errno.EMFILE, "Too many open files"))
    'too many open files; raise the limit (`ulimit -n`)'
    >>> limit_reached(ValueError("odd")) is None
    True
    """
    while error is not None:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
            return _DEVICE
        if isinstance(error, MemoryError):
            return _MEMORY
        if isinstance(error, OSError) and error.errno in _BY_NUMBER:
            return _BY_NUMBER[error.errno]
        if isinstance(error, (OSError, RuntimeError, ImportError)):
            for text, limit in _BY_TEXT.items():
                if text in str(error):
                    return limit
        error = error.__cause__ or error.__context__
    return None
