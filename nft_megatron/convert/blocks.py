"""A tensor as rectangles of bytes in files. Pure: touches no files.

Every tensor is viewed as a matrix of bytes: its last axis is a row, all other axes count as rows; the rows of a vector are its
elements. A :class:`Block` is a rectangle of that matrix together with the position of its first byte. A contiguous tensor is
one block; a QKV weight interleaved by query group is one block per group; a weight split along its columns for tensor
parallelism is one block per rank, narrower than the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nft_megatron.weights.archive import Checksum
from nft_megatron.weights.table import Entry, Piece


@dataclass(frozen=True, slots=True)
class Block:
    """Rows ``row … row + num_rows`` and bytes ``column … column + width`` of them, from byte ``offset`` of ``file``.

    ``pitch`` is the distance between rows in the file, in bytes.
    """

    file: Path
    offset: int
    row: int
    num_rows: int
    column: int
    width: int
    pitch: int


@dataclass(frozen=True)
class StoredTensor:
    """One Hugging Face tensor, wherever and however its bytes are stored.

    ``checksums`` cover the stored parts that it belongs to; tensors fused into one parameter share them.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    checksums: tuple[Checksum, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows of the matrix of bytes."""
        return matrix(self.shape)[0]

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return matrix(self.shape)[1] * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes in total."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Box:
    """A stored part of a Megatron parameter's matrix, in elements; its first byte is byte ``offset`` of ``file``."""

    file: Path
    offset: int
    row: int
    num_rows: int
    column: int
    num_columns: int


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor viewed as a matrix.

    >>> matrix((6, 4)), matrix((5,)), matrix((2, 3, 4)), matrix(())
    ((6, 4), (5, 1), (6, 4), (1, 1))
    """
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)


def whole(name: str, dtype: torch.dtype, shape: tuple[int, ...], file: Path, offset: int) -> StoredTensor:
    """A contiguous tensor."""
    rows, columns = matrix(shape)
    width = columns * dtype.itemsize
    return StoredTensor(name, dtype, shape, (Block(file, offset, 0, rows, 0, width, width),))


def source_blocks(entry: Entry, pieces: Iterable[Piece], boxes: Sequence[Box], itemsize: int) -> list[list[Block]]:
    """Locate the Hugging Face tensors of ``entry`` in its Megatron parameter. Returns the blocks of each source.

    ``pieces`` follow one another along ``entry.axis`` of the parameter (:meth:`Entry.pieces`), of which ``boxes`` are stored.

    >>> from nft_megatron.weights.table import Layout
    >>> qkv = Entry("qkv", ("q", "k", "v"), ((4, 3), (2, 3), (2, 3)), Layout.QKV, num_groups=2)
    >>> stored = Box(Path("file"), 100, row=0, num_rows=8, column=0, num_columns=3)
    >>> [[(block.row, block.num_rows, block.offset) for block in blocks]
    ...  for blocks in source_blocks(qkv, qkv.pieces(1, 0, 0), [stored], itemsize=2)]
    [[(0, 2, 100), (2, 2, 124)], [(0, 1, 112), (1, 1, 136)], [(0, 1, 118), (1, 1, 142)]]
    """
    blocks: list[list[Block]] = [[] for _ in entry.sources]
    start = 0  # of the piece, in the parameter
    for piece in pieces:
        stop = start + piece.stop - piece.start
        shift = piece.start - start  # from the parameter's numbering to the source's
        for box in boxes:
            row, last_row = box.row, box.row + box.num_rows
            column, last_column = box.column, box.column + box.num_columns
            if entry.axis == 0:
                row, last_row = max(row, start), min(last_row, stop)
            else:
                column, last_column = max(column, start), min(last_column, stop)
            if row < last_row and column < last_column:
                skipped = (row - box.row) * box.num_columns + column - box.column
                blocks[piece.source].append(
                    Block(
                        box.file,
                        box.offset + skipped * itemsize,
                        row + (shift if entry.axis == 0 else 0),
                        last_row - row,
                        (column + (shift if entry.axis == 1 else 0)) * itemsize,
                        (last_column - column) * itemsize,
                        box.num_columns * itemsize,
                    )
                )
        start = stop
    return blocks


def covers(blocks: Iterable[Block], num_bytes: int) -> bool:
    """Whether disjoint blocks hold that many bytes, so that no part of a tensor is missing."""
    return sum(block.num_rows * block.width for block in blocks) == num_bytes
