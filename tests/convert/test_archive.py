"""Archives of ``torch.save``, read without torch.load."""

import argparse
import os
from pathlib import Path

import pytest
import torch

from nft_megatron.base.errors import UserError
from nft_megatron.convert.archive import saved_bytes, tensor_frame
from nft_megatron.weights.archive import TensorAt, read_archive


def read(path: Path, start: int = 0):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_archive(path, descriptor, start, path.stat().st_size - start, "SRC")
    finally:
        os.close(descriptor)


def content_of(path: Path, tensor: TensorAt) -> torch.Tensor:
    size = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
    return torch.frombuffer(bytearray(path.read_bytes()[tensor.offset : tensor.offset + size]), dtype=tensor.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn, torch.uint8], ids=str)
def test_the_bytes_of_tensors_anywhere_in_a_structure(tmp_path: Path, dtype: torch.dtype):
    base = torch.arange(24, dtype=torch.float32).view(4, 6).to(dtype)
    structure = {
        "model": {"whole": base, "rows": base[1:3], "column": base.float()[:, 1], "transposed": base.t()},
        "parameter": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "args": argparse.Namespace(lr=0.1, path=Path("x"), dtype=torch.bfloat16),
        "list": [1, "two", None],
    }
    path = tmp_path / "file"
    path.write_bytes(b"before" + saved_bytes(structure))
    found = read(path, start=6)
    for name, rows in (("whole", slice(None)), ("rows", slice(1, 3))):
        tensor = found["model"][name]
        assert (tensor.dtype, tensor.shape) == (dtype, tuple(base[rows].shape))
        assert torch.equal(content_of(path, tensor).view(torch.uint8), base[rows].reshape(-1).view(torch.uint8))
    assert found["model"]["column"] is None  # not row-major: its elements are not next to each other
    assert found["model"]["transposed"] is None
    assert content_of(path, found["parameter"]).tolist() == [1.0, 1.0, 1.0]
    assert found["list"] == [1, "two", None]


class Harmful:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['HARM']}",)


def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    path = tmp_path / "file"
    torch.save({"model": {"w": torch.ones(2)}, "args": Harmful()}, path)
    assert read(path)["model"]["w"].shape == (2,)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("num_bytes", [0, 100, -1])
def test_a_truncated_archive(tmp_path: Path, num_bytes: int):
    path = tmp_path / "file"
    path.write_bytes(saved_bytes(torch.ones(1000))[:num_bytes])
    with pytest.raises(UserError, match="truncated or damaged"):
        read(path)


@pytest.mark.parametrize(("dtype", "shape"), [(torch.bfloat16, (1,)), (torch.float32, (3, 5)), (torch.float16, (1, 2, 700))])
def test_a_filled_frame_is_what_torch_saves(dtype: torch.dtype, shape: tuple[int, ...]):
    tensor = torch.randn(shape).to(dtype)
    frame = tensor_frame(dtype, shape)
    data = tensor.view(torch.uint8).numpy().tobytes()
    own, real = frame.before + data + frame.after, saved_bytes(tensor)
    assert len(own) == len(real)
    assert len(frame.before) % 64 == 0
    assert own[: len(frame.before)].count(b"archive/data/0") == 1
