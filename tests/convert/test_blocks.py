"""Blocks against torch's own slicing: a parameter is built by ``merge``, cut into boxes, written, and read back by rows."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from nft_megatron.convert import engine
from nft_megatron.convert.blocks import Box, StoredTensor, covers, source_blocks
from nft_megatron.convert.engine import Files, bands, read_band
from nft_megatron.weights.table import Entry, Layout, merge

QKV = Entry("qkv", ("q", "k", "v"), ((16, 6), (8, 6), (8, 6)), Layout.QKV, num_groups=4)
ENTRIES = [
    QKV,
    Entry("bias", ("q", "k", "v"), ((16,), (8,), (8,)), Layout.QKV, num_groups=4),
    Entry("fc1", ("gate", "up"), ((8, 6), (8, 6)), Layout.SPLIT),
    Entry("fc2", ("down",), ((6, 16),), Layout.SPLIT, axis=1),
    Entry("norm", ("norm",), ((7,),), Layout.WHOLE),
    Entry("embedding", ("embed",), ((5, 3),), Layout.VOCABULARY),
]


def random_sources(entry: Entry, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in entry.shapes]


def cut(length: int, parts: int) -> list[tuple[int, int]]:
    edges = [length * part // parts for part in range(parts + 1)]
    return [pair for pair in itertools.pairwise(edges) if pair[0] < pair[1]]


def write_boxes(path: Path, parameter: torch.Tensor, row_parts: int, column_parts: int) -> list[Box]:
    """Each box row-major on its own, between bytes that belong to nothing."""
    rows = parameter.view(len(parameter), -1)
    content, boxes = b"\xff" * 3, []
    for (row, last_row), (column, last_column) in itertools.product(
        cut(len(rows), row_parts), cut(rows.shape[1], column_parts)
    ):
        boxes.append(Box(path, len(content), row, last_row - row, column, last_column - column))
        content += rows[row:last_row, column:last_column].contiguous().view(torch.uint8).numpy().tobytes() + b"\xff" * 5
    path.write_bytes(content)
    return boxes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("row_parts", "column_parts"), [(1, 1), (3, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_however_a_parameter_is_cut_its_sources_are_read_back(
    tmp_path: Path, monkeypatch, entry: Entry, row_parts: int, column_parts: int, dtype: torch.dtype
):
    monkeypatch.setattr(engine, "BAND_BYTES", 100)  # a few rows
    sources = random_sources(entry, dtype)
    padded_vocab = 8
    parameter = merge(entry, sources, 1, 0, padded_vocab)
    boxes = write_boxes(tmp_path / "file", parameter, row_parts, column_parts)
    blocks_of = source_blocks(entry, entry.pieces(1, 0, padded_vocab), boxes, dtype.itemsize)
    with Files("test") as files:
        for source, blocks, shape in zip(sources, blocks_of, entry.shapes, strict=True):
            tensor = StoredTensor("x", dtype, shape, tuple(blocks))
            assert covers(blocks, source.nbytes)
            read = [read_band(files, tensor, row, count, 0).copy() for row, count in bands(tensor, tensor.row_bytes)]
            assert np.concatenate(read).tobytes() == source.view(torch.uint8).numpy().tobytes()


def test_a_box_that_is_not_there_is_noticed(tmp_path: Path):
    sources = random_sources(QKV, torch.float32)
    boxes = write_boxes(tmp_path / "file", merge(QKV, sources, 1, 0, 0), 4, 1)
    for query, key, value in [source_blocks(QKV, QKV.pieces(1, 0, 0), boxes[:3], 4)]:
        assert not covers(query, sources[0].nbytes)
        assert not covers(key, sources[1].nbytes)
        assert not covers(value, sources[2].nbytes)


def test_rows_written_through_blocks_are_the_merged_parameter(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(engine, "BAND_BYTES", 100)
    sources = random_sources(QKV, torch.float32)
    path = tmp_path / "file"
    path.write_bytes(bytes(7 + 32 * 6 * 4))
    boxes = [Box(path, 7, 0, 32, 0, 6)]
    blocks_of = source_blocks(QKV, QKV.pieces(1, 0, 0), boxes, 4)
    with Files("test") as files:
        for source, blocks in zip(sources, blocks_of, strict=True):
            tensor = StoredTensor("x", torch.float32, tuple(source.shape), tuple(blocks))
            content = source.view(torch.uint8).numpy().reshape(len(source), -1)
            for row, count in bands(tensor, tensor.row_bytes):
                files.write_rows(tensor, row, np.ascontiguousarray(content[row : row + count]))
    assert path.read_bytes()[7:] == merge(QKV, sources, 1, 0, 0).view(torch.uint8).numpy().tobytes()
