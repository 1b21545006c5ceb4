"""``torch.save`` files without loading them: where each tensor's bytes are, and an archive's frame around bytes yet to come.

``torch.save`` writes a zip archive, uncompressed: ``data.pkl`` with the structure, ``data/0`` … with the bytes of each storage,
and the CRC-32 of each (which torch itself ignores when it loads). Structures are read with an unpickler that runs no code of
the file's choosing: anything not on the list of harmless classes becomes an :class:`Inert`.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

import torch

from nft_megatron.base.errors import UserError
from nft_megatron.convert.blocks import Checksum


class Inert:
    """Stands in for an object of a class that is not on the list. Accepts anything and does nothing."""

    def __init__(self, *values: object, **named: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def append(self, value: object) -> None:
        """Ignore it."""

    def extend(self, values: object) -> None:
        """Ignore them."""

    def __setitem__(self, key: object, value: object) -> None:
        pass


class SafeUnpickler(pickle.Unpickler):
    """Builds only plain Python objects and those of the given classes, by full name."""

    def __init__(self, file: io.BufferedIOBase, allowed: Mapping[str, Any]) -> None:
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        value = self._allowed.get(f"{module}.{name}", Inert)
        if module == "torch" and value is Inert and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return value


@dataclass(frozen=True)
class TensorAt:
    """A tensor in a file: row-major from byte ``offset``. ``checksum`` is that of its storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    checksum: Checksum


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    checksum: Checksum

    def tensor(self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object) -> TensorAt | None:
        """None for a tensor that is not stored row by row."""
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
    ) -> TensorAt | None:
        """For a dtype without its own storage class."""
        return self._tensor(dtype, offset, shape, stride)

    def _tensor(self, dtype: torch.dtype, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> TensorAt | None:
        expected = 1
        for length, step in zip(reversed(shape), reversed(stride), strict=True):
            if length > 1 and step != expected:
                return None
            expected *= length
        return TensorAt(dtype, tuple(shape), self.checksum.offset + offset * dtype.itemsize, self.checksum)


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

_ALLOWED: Mapping[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch._utils._rebuild_tensor_v2": _Storage.tensor,
    "torch._utils._rebuild_tensor_v3": _Storage.tensor_of,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    **_STORAGES,
}


class _Window(io.RawIOBase):
    """``num_bytes`` of a file from ``start``, as a file."""

    def __init__(self, descriptor: int, start: int, num_bytes: int) -> None:
        self._descriptor, self._start, self._size, self._position = descriptor, start, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        data = os.pread(self._descriptor, count, self._start + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def read_archive(file: Path, descriptor: int, start: int, num_bytes: int, field: str) -> Any:
    """The object given to ``torch.save``, with :class:`TensorAt` in place of tensors (None if not row-major).

    The archive is ``num_bytes`` of ``file`` (open as ``descriptor``) from ``start``.

    Raises:
        UserError: naming ``field`` and the file if this is not a complete little-endian archive.
    """
    try:
        with zipfile.ZipFile(_Window(descriptor, start, num_bytes)) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
                raise UserError(field, file, "was written by a big-endian machine", "rewrite it on a little-endian machine")

            def storage(identity: tuple[str, Any, str, str, int]) -> _Storage:
                _, dtype, key, _, _ = identity
                info = records[f"data/{key}"]
                header = os.pread(descriptor, 30, start + info.header_offset)
                name_and_extra = sum(struct.unpack("<HH", header[26:30]))
                offset = start + info.header_offset + 30 + name_and_extra
                return _Storage(dtype, Checksum(file, offset, info.file_size, info.CRC))

            unpickler = SafeUnpickler(io.BytesIO(archive.read(records["data.pkl"])), _ALLOWED)
            unpickler.persistent_load = storage  # type: ignore[method-assign]
            return unpickler.load()
    except (UserError, OSError):
        raise
    except Exception as error:  # a damaged file may raise anything, even MemoryError
        raise UserError(
            field, file, f"is truncated or damaged at byte {start} ({error})", "copy or rewrite the checkpoint"
        ) from error


@dataclass(frozen=True)
class Frame:
    """What precedes and follows the bytes of an archive's one tensor."""

    before: bytes
    after: bytes


class _Halves:
    """A file that keeps what is written before and after the one hole that is seeked over."""

    def __init__(self) -> None:
        self.halves = [bytearray()]
        self.hole = 0

    def write(self, data: bytes) -> int:
        self.halves[-1] += data
        return len(data)

    def seek(self, offset: int, whence: int) -> int:
        assert whence == os.SEEK_CUR and not self.hole
        self.hole = offset
        self.halves.append(bytearray())
        return self.tell()

    def tell(self) -> int:
        return sum(map(len, self.halves)) + self.hole

    def flush(self) -> None:
        pass


@lru_cache(maxsize=256)
def tensor_frame(dtype: torch.dtype, shape: tuple[int, ...]) -> Frame:
    """What ``torch.save`` writes around the bytes of a tensor.

    >>> x = torch.arange(10.0)
    >>> frame = tensor_frame(x.dtype, (10,))
    >>> torch.equal(torch.load(io.BytesIO(frame.before + bytes(x.numpy().data) + frame.after)), x)
    True
    """
    file = _Halves()
    with torch.serialization.skip_data():
        torch.save(torch.empty(shape, dtype=dtype), cast(IO[bytes], file))  # memory that is never touched
    assert file.hole == math.prod(shape) * dtype.itemsize, "torch.save skipped something other than the tensor"
    before, after = file.halves
    return Frame(bytes(before), bytes(after))


def saved_bytes(value: object) -> bytes:
    """``torch.save`` into memory, for small objects."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
