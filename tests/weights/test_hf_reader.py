import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nft_megatron.base.errors import UserError
from nft_megatron.weights.hf_reader import HFReader
from nft_megatron.weights.table import Entry, Layout, WeightTable

TENSORS = {"a": torch.arange(12.0).view(4, 3), "b": torch.arange(5).bfloat16()}
TABLE = WeightTable(
    (Entry("A", ("a",), ((4, 3),), Layout.SPLIT), Entry("B", ("b",), ((5,),), Layout.WHOLE)), copies={"spare": "b"}
)


def write_shards(folder: Path) -> None:
    for number, (name, tensor) in enumerate(TENSORS.items()):
        save_file({name: tensor}, folder / f"model-{number}.safetensors")
    weight_map = {name: f"model-{number}.safetensors" for number, name in enumerate(TENSORS)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("sharded", [False, True])
def test_slices_along_either_axis(tmp_path: Path, sharded: bool):
    if sharded:
        write_shards(tmp_path)
    else:
        save_file(TENSORS, tmp_path / "model.safetensors")
    with HFReader(tmp_path) as reader:
        reader.check(TABLE)
        assert reader.names == {"a", "b"}
        assert torch.equal(reader.read("a", 0, 1, 3), TENSORS["a"][1:3])
        assert torch.equal(reader.read("a", 1, 2, 3), TENSORS["a"][:, 2:])
        assert torch.equal(reader.read("b", 0, 0, 5), TENSORS["b"])
        assert reader.read("b", 0, 0, 5).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"a": TENSORS["a"]}, "lacks the tensor b"),
        ({**TENSORS, "c": torch.zeros(2)}, "unexpected tensor c"),
        ({**TENSORS, "a": torch.zeros(4, 4)}, r"a has shape \[4, 4\], but config.json implies \[4, 3\]"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, tensors: dict[str, torch.Tensor], problem: str):
    save_file(tensors, tmp_path / "model.safetensors")
    with HFReader(tmp_path) as reader, pytest.raises(UserError, match=problem):
        reader.check(TABLE)


def test_a_stored_copy_is_ignored(tmp_path: Path):
    save_file({**TENSORS, "spare": TENSORS["b"].float()}, tmp_path / "model.safetensors")
    with HFReader(tmp_path) as reader:
        assert reader.check(TABLE) == ("ignored: spare, a stored copy of b, to which config.json ties it",)


@pytest.mark.parametrize("change", ["one byte less", "one byte more"])
def test_a_file_of_another_length_than_its_header_says(tmp_path: Path, change: str):
    save_file(TENSORS, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-1] if change == "one byte less" else content + b"\0")
    with pytest.raises(UserError, match=r"model\.safetensors: is not a complete safetensors file \(.*not fully covered"):
        HFReader(tmp_path)


def test_a_tensor_wider_than_a_band_is_read_by_columns(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("nft_megatron.weights.hf_reader._BAND_BYTES", 24)  # two rows of three floats
    save_file(TENSORS, tmp_path / "model.safetensors")
    with HFReader(tmp_path) as reader:
        assert torch.equal(reader.read("a", 1, 1, 3), TENSORS["a"][:, 1:])


def test_broken_folders(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        HFReader(tmp_path / "absent")
    with pytest.raises(UserError, match="no weights"):
        HFReader(tmp_path)

    write_shards(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"names model-1\.safetensors, which is not there"):
        HFReader(tmp_path)

    save_file({"other": TENSORS["b"]}, tmp_path / "model-1.safetensors")
    with pytest.raises(UserError, match="lacks b"):
        HFReader(tmp_path)

    (tmp_path / "model-1.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match=r"model-1\.safetensors: is not a complete safetensors file"):
        HFReader(tmp_path)

    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="is not a JSON object but a list"):
        HFReader(tmp_path)


def test_whole_numbers_are_no_weights(tmp_path: Path):
    save_file({"a": torch.zeros(4, 3, dtype=torch.int32), "b": torch.zeros(5)}, tmp_path / "model.safetensors")
    with HFReader(tmp_path) as reader, pytest.raises(UserError, match="a holds int32, not floating-point numbers"):
        reader.check(TABLE)
