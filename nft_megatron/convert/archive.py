"""The bytes that ``torch.save`` writes: an archive's frame around bytes yet to come, and small objects."""

from __future__ import annotations

import io
import math
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, cast

import torch


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
