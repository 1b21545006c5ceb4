"""The scan for non-finite values against torch's, stored checksums, and how threads end."""

import os
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from nft_megatron.base.errors import UserError
from nft_megatron.convert.blocks import whole
from nft_megatron.convert.engine import Files, cast_band, first_non_finite, read_band, run_all
from nft_megatron.weights.archive import Checksum

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float8_e4m3fn], ids=str)
def test_every_pattern_of_a_small_dtype_is_judged_as_torch_does(dtype: torch.dtype):
    patterns = torch.arange(256**dtype.itemsize).to(torch.int16 if dtype.itemsize == 2 else torch.uint8)
    values = patterns.view(dtype)
    finite = values.float().isfinite()
    for number in range(0, len(values), 1 if dtype.itemsize == 1 else 61):
        found = first_non_finite(values[number : number + 1].view(torch.uint8).numpy(), dtype)
        assert (found is None) == bool(finite[number]), hex(number)
    assert first_non_finite(values.view(torch.uint8).numpy(), dtype) == int(finite.logical_not().nonzero()[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_bad_value_among_the_largest_and_smallest_numbers(dtype: torch.dtype, bad: float):
    limits = torch.finfo(dtype)
    values = torch.tensor([limits.max, limits.min, limits.tiny, -limits.tiny, 0.0, -0.0], dtype=dtype).repeat(50_000)
    assert first_non_finite(values.view(torch.uint8).numpy(), dtype) is None
    values[271_828] = bad
    assert first_non_finite(values.view(torch.uint8).numpy(), dtype) == 271_828


def test_whole_numbers_are_always_finite():
    assert first_non_finite(np.full(64, 255, np.uint8), torch.int64) is None


def test_a_cast_is_torchs(tmp_path: Path):
    values = torch.randn(6, 5)
    band = cast_band(values.view(torch.uint8).numpy(), torch.float32, torch.bfloat16)
    assert band.shape == (6, 10)
    assert band.tobytes() == values.bfloat16().view(torch.uint8).numpy().tobytes()


def test_a_stored_checksum(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"head" + bytes(range(100)))
    with Files("SRC") as files:
        files.verify(Checksum(path, 4, 100, zlib.crc32(bytes(range(100)))), "w")
        with pytest.raises(UserError, match="the bytes of w do not match their stored checksum"):
            files.verify(Checksum(path, 4, 100, 1), "w")


def test_a_file_that_ends_too_early(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(bytes(10))
    tensor = whole("w", torch.float32, (2, 2), path, 0)
    with Files("SRC") as files, pytest.raises(UserError, match="is truncated"):
        read_band(files, tensor, 0, 2, 0)


def test_the_first_failure_ends_all_work(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(bytes(16))
    tensor = whole("w", torch.float32, (2, 2), path, 0)
    begun = threading.Event()

    def fail() -> None:
        begun.wait(30)
        raise OSError(28, os.strerror(28))

    with Files("SRC") as files:

        def read_for_ever() -> None:
            begun.set()
            while True:
                read_band(files, tensor, 0, 2, 0)

        with pytest.raises(OSError, match="No space"):
            run_all([read_for_ever, fail, *[read_for_ever] * 3], 2, files.stop)
