"""``torch.save`` files, read without ``torch.load``: where each tensor's bytes are, or the whole object.

``torch.save`` writes a zip archive, uncompressed: ``data.pkl`` with the structure, ``data/0`` … with the bytes of each storage,
and the CRC-32 of each (which torch itself ignores when it loads). Structures are read by :mod:`nft_megatron.base.inert_pickle`,
so nothing that a file names is imported or called.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nft_megatron.base.errors import UserError
from nft_megatron.base.inert_pickle import read_pickle

_REMEDY = "copy or rewrite the checkpoint"
_MOST_DIRECTORY_BYTES = 1 << 25
"""Of an archive's list of records: about half a million."""
_MOST_PICKLE_BYTES = 1 << 28

Source = int | bytearray
"""A file: its descriptor, or its bytes."""


@dataclass(frozen=True, slots=True)
class Checksum:
    """The CRC-32 that a writer stored for ``num_bytes`` from byte ``offset`` of ``file``."""

    file: Path
    offset: int
    num_bytes: int
    crc32: int


@dataclass(frozen=True)
class TensorAt:
    """A tensor in a file: row-major from byte ``offset``. ``checksum`` is that of its storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    checksum: Checksum


@dataclass(frozen=True)
class _Storage:
    """Bytes of the archive, and what a tensor in them becomes: ``make(dtype, first element, shape, stride)``."""

    dtype: torch.dtype
    num_bytes: int
    make: Callable[[torch.dtype, int, tuple[int, ...], tuple[int, ...]], Any]

    def tensor(self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Any:
        return self._tensor(self.dtype, offset, shape, stride)

    def tensor_of(
        self,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        _gradient: bool,
        _hooks: object,
        dtype: torch.dtype,
        *_: object,
    ) -> Any:
        """For a dtype without its own storage class."""
        return self._tensor(dtype, offset, shape, stride)

    def _tensor(self, dtype: torch.dtype, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Any:
        sizes = [offset, *shape, *stride]
        if len(shape) != len(stride) or not all(type(size) is int and size >= 0 for size in sizes):
            raise ValueError(f"a tensor of shape {shape} and stride {stride} from element {offset}")
        last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        if 0 not in shape and (last + 1) * dtype.itemsize > self.num_bytes:
            raise ValueError(f"a tensor ends at byte {(last + 1) * dtype.itemsize} of a storage of {self.num_bytes} bytes")
        return self.make(dtype, offset, tuple(shape), tuple(stride))


_STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "BFloat16": torch.bfloat16,
        "Half": torch.float16,
        "Float": torch.float32,
        "Double": torch.float64,
        "Byte": torch.uint8,
        "Char": torch.int8,
        "Short": torch.int16,
        "Int": torch.int32,
        "Long": torch.int64,
        "Bool": torch.bool,
    }.items()
} | {"torch.storage.UntypedStorage": torch.uint8}

DTYPE_NAMES: Mapping[str, torch.dtype] = {
    f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
"""Every dtype, as pickles name it."""

_KNOWN: Mapping[str, Any] = {
    **DTYPE_NAMES,
    **_STORAGES,
    "torch._utils._rebuild_tensor_v2": _Storage.tensor,
    "torch._utils._rebuild_tensor_v3": _Storage.tensor_of,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.Size": tuple,
}


def _read_at(source: Source, num_bytes: int, offset: int) -> bytes:
    """At most ``num_bytes``, as ``os.pread``."""
    return os.pread(source, num_bytes, offset) if isinstance(source, int) else bytes(source[offset : offset + num_bytes])


class _Window(io.RawIOBase):
    """``num_bytes`` of a file from ``start``, as a file of which ``zipfile`` reads the directory and small records."""

    def __init__(self, source: Source, start: int, num_bytes: int) -> None:
        self._source, self._start, self._size, self._position = source, start, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        size = left if size < 0 else min(size, left)
        if size > _MOST_DIRECTORY_BYTES:
            raise ValueError(f"its list of records has {size} bytes")
        data = _read_at(self._source, size, self._start + self._position)
        self._position += len(data)
        return data


@dataclass(frozen=True)
class _Archive:
    """``num_bytes`` from ``start`` of ``source``."""

    source: Source
    start: int
    records: Mapping[str, zipfile.ZipInfo]
    num_bytes: int

    @staticmethod
    def open(source: Source, start: int, num_bytes: int) -> _Archive:
        with zipfile.ZipFile(_Window(source, start, num_bytes)) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        return _Archive(source, start, records, num_bytes)

    def place(self, name: str) -> tuple[int, int, int]:
        """Where a record's bytes are in the file: offset, number, CRC-32. A compressed one is refused: torch writes none."""
        info = self.records[name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise ValueError(f"its record {name} is compressed or encrypted")
        header = _read_at(self.source, 30, self.start + info.header_offset)
        offset = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if header[:4] != b"PK\x03\x04" or not 0 <= offset <= offset + info.file_size <= self.num_bytes:
            raise ValueError(f"its record {name} lies outside of it")
        return self.start + offset, info.file_size, info.CRC

    def read(self, name: str, most: int) -> bytes:
        """A record's bytes."""
        offset, num_bytes, crc32 = self.place(name)
        if num_bytes > most:
            raise ValueError(f"its record {name} has {num_bytes} bytes")
        data = _read_at(self.source, num_bytes, offset)
        if crc32 and zlib.crc32(data) != crc32:  # 0: written without one
            raise ValueError(f"its record {name} does not match its checksum")
        return data


def read_archive(file: Path, descriptor: int, start: int, num_bytes: int, field: str) -> Any:
    """The object given to ``torch.save``, with :class:`TensorAt` in place of tensors (None if not row-major), and a
    :class:`~nft_megatron.base.inert_pickle.Record` in place of whatever is not plain data.

    The archive is ``num_bytes`` of ``file`` (open as ``descriptor``) from ``start``.

    Raises:
        UserError: naming ``field`` and the file if this is not a complete little-endian archive.
    """

    def storage(archive: _Archive, dtype: torch.dtype, key: str) -> _Storage:
        checksum = Checksum(file, *archive.place(f"data/{key}"))

        def make(dtype: torch.dtype, first: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> TensorAt | None:
            if not _is_row_major(shape, stride):
                return None
            return TensorAt(dtype, shape, checksum.offset + first * dtype.itemsize, checksum)

        return _Storage(dtype, checksum.num_bytes, make)

    return _read(file, descriptor, start, num_bytes, field, storage, refuse_others=False)


def load_archive(file: Path, source: Source, start: int, num_bytes: int, field: str) -> Any:
    """The object given to ``torch.save``, with its tensors on the CPU: what ``torch.load`` would return. Tensors of a file that
    is in memory are views of it.

    Raises:
        UserError: as :func:`read_archive`, and naming the class or function if the object is more than plain data and tensors.
    """
    loaded: dict[str, torch.Tensor] = {}

    def storage(archive: _Archive, dtype: torch.dtype, key: str) -> _Storage:
        offset, size, _ = archive.place(f"data/{key}")

        def make(dtype: torch.dtype, first: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
            if key not in loaded:
                loaded[key] = _bytes(source, offset, size)
            whole = loaded[key][: size // dtype.itemsize * dtype.itemsize].view(dtype)
            return whole.as_strided(shape, stride, first)

        return _Storage(dtype, size, make)

    return _read(file, source, start, num_bytes, field, storage, refuse_others=True)


def _bytes(source: Source, offset: int, num_bytes: int) -> torch.Tensor:
    if isinstance(source, int):
        data = torch.empty(num_bytes, dtype=torch.uint8)
        read_into(source, offset, data)
        return data
    if not num_bytes:
        return torch.empty(0, dtype=torch.uint8)  # which frombuffer refuses
    return torch.frombuffer(source, dtype=torch.uint8, count=num_bytes, offset=offset)


def load_file(file: Path, field: str) -> Any:
    """:func:`load_archive` of a whole file."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return load_archive(file, descriptor, 0, os.fstat(descriptor).st_size, field)
    finally:
        os.close(descriptor)


def read_into(descriptor: int, offset: int, data: torch.Tensor) -> None:
    """Fill ``data``, a vector of bytes. Raises :class:`EOFError` if the file ends before."""
    view = data.numpy().data
    while view:
        count = os.preadv(descriptor, [view], offset)
        if not count:
            raise EOFError(f"it ends at byte {offset}")
        view, offset = view[count:], offset + count


def _is_row_major(shape: Sequence[int], stride: Sequence[int]) -> bool:
    expected = 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if length > 1 and step != expected:
            return False
        expected *= length
    return True


def _read(
    file: Path,
    source: Source,
    start: int,
    num_bytes: int,
    field: str,
    storage: Callable[[_Archive, torch.dtype, str], _Storage],
    *,
    refuse_others: bool,
) -> Any:
    try:
        archive = _Archive.open(source, start, num_bytes)
        if "byteorder" in archive.records and archive.read("byteorder", 16) != b"little":
            raise UserError(field, file, "was written by a big-endian machine", "rewrite it on a little-endian machine")

        def persistent(identity: Any) -> _Storage:
            _, dtype, key, _, _ = identity
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"a storage of type {dtype}")
            return storage(archive, dtype, key)

        data = archive.read("data.pkl", _MOST_PICKLE_BYTES)
        return read_pickle(data, _KNOWN, persistent=persistent, refuse_others=refuse_others)
    except (UserError, OSError):
        raise
    except Exception as error:  # a damaged file may raise anything, even MemoryError
        problem = f"is truncated or damaged at byte {start} ({error})"
        raise UserError(field, file, problem, _REMEDY) from error
