"""Moves and compares tensors by bands of rows: each band is read, checked, hashed and written while it is in the cache.

Memory is two bands per thread, whatever the size of the model. Threads suffice to use all cores: reading, writing, hashing and
numpy's loops all run outside Python's lock.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from nft_megatron.base.errors import UserError
from nft_megatron.convert.blocks import StoredTensor
from nft_megatron.weights.archive import Checksum

BAND_BYTES = 8 << 20
_WRITEBACK_BYTES = 1 << 20  # parts of at least this size start their way to disk when written
_NUM_BEHIND = 16  # this many parts later they should be there
_SCAN_BYTES = 1 << 17  # scanned at once for non-finite values: fits the second-level cache

Bytes = np.ndarray
T = TypeVar("T")

# Twice an infinity or a NaN as an unsigned number: the exponent is all ones, the sign is shifted out. (Type, least of them.)
_NON_FINITE = {
    torch.bfloat16: (np.uint16, 0xFF00),
    torch.float16: (np.uint16, 0xF800),
    torch.float32: (np.uint32, 0xFF000000),
    torch.float64: (np.uint64, 0xFFE0000000000000),
    torch.float8_e5m2: (np.uint8, 0xF8),
    torch.float8_e4m3fn: (np.uint8, 0xFE),
}


class Stopped(Exception):
    """Another thread failed, or the user interrupted."""


class Files:
    """Open files, shared by all threads; a context manager. Errors name ``field``."""

    def __init__(self, field: str) -> None:
        self.field = field
        self.stop = threading.Event()
        self._descriptors: dict[tuple[Path, int], int] = {}
        self._lock = threading.Lock()
        self._behind: deque[tuple[int, int, int]] = deque()  # being written out: descriptor, offset, number of bytes

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def descriptor(self, file: Path, flags: int = os.O_RDONLY) -> int:
        """Descriptor of an open file."""
        with self._lock:
            if (file, flags) not in self._descriptors:
                self._descriptors[file, flags] = os.open(file, flags)
            return self._descriptors[file, flags]

    def read(self, file: Path, offset: int, out: Bytes) -> None:
        """Fill ``out``. Raises :class:`UserError` if the file ends too early."""
        if self.stop.is_set():
            raise Stopped
        view, descriptor = out.data, self.descriptor(file)
        while view:
            count = os.preadv(descriptor, [view], offset)
            if not count:
                raise UserError(self.field, file, f"is truncated: it ends before byte {offset + len(view)}", "copy it again")
            view, offset = view[count:], offset + count

    def write(self, file: Path, offset: int, data: memoryview) -> None:
        """Write all of ``data``. Raises :class:`OSError` naming the file."""
        if self.stop.is_set():
            raise Stopped
        view, position, descriptor = data, offset, self.descriptor(file, os.O_RDWR)
        try:
            while view:
                count = os.pwrite(descriptor, view, position)
                view, position = view[count:], position + count
            if len(data) >= _WRITEBACK_BYTES:
                self._write_out(descriptor, offset, len(data))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from error

    def _write_out(self, descriptor: int, offset: int, num_bytes: int) -> None:
        """Start writing to disk now, not at the final fsync, and release memory as the disk catches up.

        Advising that a range is not needed makes Linux start writing it without waiting, and drop what has been written
        (mm/fadvise.c). So every range is advised twice, and a conversion does not occupy as many pages as the model has.
        """
        with self._lock:
            self._behind.append((descriptor, offset, num_bytes))
            written = self._behind.popleft() if len(self._behind) > _NUM_BEHIND else None
        os.posix_fadvise(descriptor, offset, num_bytes, os.POSIX_FADV_DONTNEED)
        if written is not None:
            os.posix_fadvise(*written, os.POSIX_FADV_DONTNEED)

    def read_rows(self, tensor: StoredTensor, row: int, out: Bytes) -> None:
        """Fill ``out``, a matrix of bytes, with the rows of ``tensor`` starting at ``row``."""
        last = row + len(out)
        for block in tensor.blocks:
            first, stop = max(row, block.row), min(last, block.row + block.num_rows)
            if first >= stop:
                continue
            place = out[first - row : stop - row, block.column : block.column + block.width]
            offset = block.offset + (first - block.row) * block.pitch
            if place.flags.c_contiguous and (block.pitch == block.width or stop - first == 1):
                self.read(block.file, offset, place.reshape(-1))
            else:  # a shard of columns: read its rows at once, then copy them into their columns
                num_bytes = (stop - first - 1) * block.pitch + block.width
                rows = thread_buffer(2, (stop - first) * block.pitch)
                self.read(block.file, offset, rows[:num_bytes])
                place[:] = rows.reshape(stop - first, block.pitch)[:, : block.width]

    def write_rows(self, tensor: StoredTensor, row: int, data: Bytes) -> None:
        """The reverse, for blocks as wide as the tensor."""
        last = row + len(data)
        for block in tensor.blocks:
            assert block.pitch == block.width == data.shape[1]
            first, stop = max(row, block.row), min(last, block.row + block.num_rows)
            if first < stop:
                offset = block.offset + (first - block.row) * block.pitch
                self.write(block.file, offset, data[first - row : stop - row].reshape(-1).data)

    def verify(self, checksum: Checksum, what: str) -> None:
        """Raise :class:`UserError` unless the bytes match their stored checksum."""
        crc32, position = 0, 0
        buffer = thread_buffer(0, BAND_BYTES)
        while position < checksum.num_bytes:
            band = buffer[: min(BAND_BYTES, checksum.num_bytes - position)]
            self.read(checksum.file, checksum.offset + position, band)
            crc32 = zlib.crc32(band.data, crc32)
            position += len(band)
        if crc32 != checksum.crc32:
            raise UserError(
                self.field,
                checksum.file,
                f"is damaged: the bytes of {what} do not match their stored checksum",
                "copy the checkpoint again, or use an older one",
            )


_LOCAL = threading.local()


def thread_buffer(number: int, num_bytes: int) -> Bytes:
    """A buffer of this thread, reused by its next call with the same ``number``."""
    buffers = _LOCAL.__dict__.setdefault("buffers", {})
    if number not in buffers or len(buffers[number]) < num_bytes:
        buffers[number] = np.empty(max(num_bytes, BAND_BYTES), np.uint8)
    buffer: Bytes = buffers[number]
    return buffer[:num_bytes]


def bands(tensor: StoredTensor, widest: int) -> Iterator[tuple[int, int]]:
    """Split the rows into (first row, number of rows), so that rows of ``widest`` bytes fit into a band."""
    step = max(1, BAND_BYTES // max(widest, 1))
    for row in range(0, tensor.num_rows, step):
        yield row, min(step, tensor.num_rows - row)


def read_band(files: Files, tensor: StoredTensor, row: int, num_rows: int, buffer: int) -> Bytes:
    """Rows of a tensor as a matrix of bytes in the thread's buffer of that number."""
    out = thread_buffer(buffer, num_rows * tensor.row_bytes).reshape(num_rows, tensor.row_bytes)
    files.read_rows(tensor, row, out)
    return out


def cast_band(band: Bytes, dtype: torch.dtype, to: torch.dtype) -> Bytes:
    """The same numbers in another dtype; a new array if the dtype differs."""
    if dtype == to:
        return band
    values = torch.from_numpy(band.reshape(-1)).view(dtype).to(to)
    return values.view(torch.uint8).numpy().reshape(len(band), -1)


def first_non_finite(band: Bytes, dtype: torch.dtype) -> int | None:
    """The number of the first element that is infinite or NaN; None if all are finite (or integers).

    >>> x = torch.tensor([1.0, -2.0, 3.0, float("-inf")], dtype=torch.bfloat16)
    >>> first_non_finite(x.view(torch.uint8).numpy(), x.dtype)
    3
    """
    if dtype not in _NON_FINITE:
        return None
    kind, least = _NON_FINITE[dtype]
    numbers = band.reshape(-1).view(kind)
    step = _SCAN_BYTES // numbers.itemsize
    doubled = np.empty(min(step, len(numbers)), kind)
    for start in range(0, len(numbers), step):
        part = numbers[start : start + step]
        twice = np.add(part, part, out=doubled[: len(part)])
        if twice.max() >= least:
            return start + int(np.argmax(twice >= least))
    return None


def element(tensor: StoredTensor, row: int, number: int) -> list[int]:
    """The index of an element; ``number`` counts from the beginning of ``row``."""
    columns = tensor.row_bytes // tensor.dtype.itemsize
    return [int(index) for index in np.unravel_index(row * columns + number, tensor.shape)] if tensor.shape else []


def run_all(work: Iterable[Callable[[], T]], workers: int, stop: threading.Event) -> list[T]:
    """Run all of ``work`` on that many threads. The first failure stops the others at their next read and is raised."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="convert")
    futures = [pool.submit(call) for call in work]
    try:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        failed = [future for future in done if future.exception() is not None]
    except BaseException:
        stop.set()
        raise
    finally:
        if any(not future.done() for future in futures):
            stop.set()
        pool.shutdown(cancel_futures=True)
    errors = [error for future in failed if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error
    return [future.result() for future in futures]
