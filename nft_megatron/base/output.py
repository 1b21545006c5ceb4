"""Standard output and error, whatever they lead to: nothing, a full disk, a pipe that nobody reads, an ASCII terminal.

A command's standard output is its result: if it cannot be written, :class:`OutputError` ends the command. In a run it is only
the display, and after :func:`outlive_output` the run continues without it. Standard error never ends anything.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

_PATIENCE_SECONDS = 10.0
"""How long a run waits for a reader, such as a pager or a stopped terminal, that takes nothing."""
_EXIT_OUTPUT, _EXIT_PIPE = 1, 128 + 13
"""As of other programs: of cat on a full disk; and of those that SIGPIPE ends, as in ``yes | head``."""


class OutputError(Exception):
    """Standard output cannot be written.

    >>> OutputError(errno.EPIPE, "Broken pipe").exit_code
    141
    """

    def __init__(self, number: int, problem: str) -> None:
        super().__init__(number, problem)
        self.message = f"standard output: {problem}; what was printed is incomplete"
        self.is_quiet = number == errno.EPIPE
        self.exit_code = _EXIT_PIPE if number == errno.EPIPE else _EXIT_OUTPUT


class _Descriptor(io.RawIOBase):
    """Writes to a descriptor. Failures raise :class:`OutputError`, or are dropped if ``is_expendable``."""

    def __init__(self, number: int, name: str, before: TextIO | None, *, is_expendable: bool) -> None:
        self._number, self._name, self.is_expendable = number, name, is_expendable
        self._before = before  # closing it would close the descriptor
        self._problem = None if before is not None else "is closed"
        self.patience: float | None = None
        self.remark: str | None = None
        """What a run says when it first loses something."""

    def fileno(self) -> int:
        return self._number

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                self._wait()
                with contextlib.suppress(BlockingIOError):  # another program that shares the terminal made it non-blocking
                    rest = rest[os.write(self._number, rest if self.patience is None else rest[: select.PIPE_BUF]) :]
            if self.patience is not None:
                self.patience = _PATIENCE_SECONDS
        except OSError as error:
            if not self.is_expendable:
                raise OutputError(error.errno or 0, error.strerror or str(error)) from error
            self._problem = error.strerror
            self.report_loss()
        return size

    def _wait(self) -> None:
        """Until a write of up to PIPE_BUF bytes would not block."""
        poll = select.poll()
        poll.register(self._number, select.POLLOUT)
        deadline = time.monotonic() + (self.patience or 0.0)
        while not poll.poll(None if self.patience is None else 1e3 * max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                self.patience = 0.0  # until it is read again
                raise OSError(errno.ETIMEDOUT, "nobody reads it")

    def report_loss(self) -> None:
        """Say once, on the other stream, what is lost and why."""
        from nft_megatron.base.rank_info import rank_info  # not before: help needs nothing of it

        if self._problem is None or self.remark is None:
            return
        line, self.remark = f"nft-megatron: {self._name}: {self._problem}; {self.remark}\n", None
        other = _descriptor_of(sys.stderr if _descriptor_of(sys.stdout) is self else sys.stdout)
        if other is not None and rank_info().rank == 0:
            other.write(line.encode())  # past its buffer, whose lock another thread may hold that waits for ours


def guard_output() -> None:
    """Take over both streams: descriptors that the caller closed lead to /dev/null, and characters that an encoding lacks are
    escaped. Streams that something else has replaced, as a notebook does, are left as they are.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the next file opened would get this number, and whatever is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = _guarded(sys.stdout, 1, "standard output", is_expendable=False)
    sys.stderr = _guarded(sys.stderr, 2, "standard error", is_expendable=True)


def outlive_output() -> None:
    """From now on this process continues when its output fails, and says so once where it can."""
    guard_output()
    remarks = "the run continues without its display", "the run continues without its warnings"
    for stream, remark in zip((sys.stdout, sys.stderr), remarks, strict=True):
        if (descriptor := _descriptor_of(stream)) is not None:
            descriptor.is_expendable, descriptor.patience, descriptor.remark = True, _PATIENCE_SECONDS, remark
    for stream in (sys.stdout, sys.stderr):
        if (descriptor := _descriptor_of(stream)) is not None:
            descriptor.report_loss()


@contextlib.contextmanager
def guarded_output() -> Iterator[None]:
    """Both streams guarded; written out at the end of the block.

    Raises:
        OutputError: standard output could not be written. It is no longer waited for, so the process can end in peace.
    """
    guard_output()
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        if (descriptor := _descriptor_of(sys.stdout)) is not None:
            descriptor.is_expendable = True  # what is still in its buffer
        raise


def _guarded(stream: TextIO | None, number: int, name: str, *, is_expendable: bool) -> Any:
    if _descriptor_of(stream) is not None:
        return stream
    if stream is not None:
        try:
            if stream.fileno() != number or not isinstance(stream, io.TextIOWrapper):
                return stream
            with contextlib.suppress(OSError):
                stream.flush()
        except (OSError, ValueError, AttributeError):
            return stream
    raw = _Descriptor(number, name, stream, is_expendable=is_expendable)
    is_unbuffered = isinstance(stream, io.TextIOWrapper) and isinstance(stream.buffer, io.RawIOBase)  # python -u
    return io.TextIOWrapper(
        raw if is_unbuffered else io.BufferedWriter(raw),  # type: ignore[arg-type]
        encoding=stream.encoding if stream is not None else "utf-8",
        errors="backslashreplace",
        newline="\n",
        line_buffering=stream is None or getattr(stream, "line_buffering", False),
        write_through=getattr(stream, "write_through", False),
    )


def _descriptor_of(stream: Any) -> _Descriptor | None:
    """The descriptor under a guarded stream; None for any other."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(raw, _Descriptor) else None
