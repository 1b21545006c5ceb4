"""Small bfloat16 models as folders of one and of several files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import tiny_model

from nft_megatron.convert.commands import to_megatron

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> dict[str, Path]:
    """``untied``, ``tied``, and ``sharded``: the untied one in eight files."""
    folder = tmp_path_factory.mktemp("sources")
    for name, family in (("untied", "qwen2"), ("tied", "qwen2 tied")):
        tiny_model(family, torch.bfloat16).save_pretrained(folder / name)
        (folder / name / "tokenizer.json").write_text('{"a": 1}\n')
        (folder / name / "chat_template.jinja").write_text("{{ messages }}")
    cut_into_eight(folder / "untied", folder / "sharded")
    return {path.name: path for path in folder.iterdir()}


def cut_into_eight(folder: Path, target: Path) -> None:
    """The same model with its tensors in eight files."""
    shutil.copytree(folder, target)
    (target / "model.safetensors").unlink()
    tensors = list(load_file(folder / "model.safetensors").items())
    weight_map = {}
    for number in range(8):
        shard = f"model-{number + 1:05d}-of-00008.safetensors"
        save_file(dict(tensors[number::8]), target / shard)
        weight_map |= dict.fromkeys(dict(tensors[number::8]), shard)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def tensors_of(folder: Path) -> Tensors:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def add_nan(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][5, 17] = float("nan")


@pytest.fixture
def converted(sources, tmp_path: Path) -> Path:
    to_megatron(sources["untied"], tmp_path / "converted")
    return tmp_path / "converted"


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[Path, Callable[[Tensors], object]], Path]:
    """A copy of a folder of one file whose tensors have been changed."""

    def change(folder: Path, action: Callable[[Tensors], object]) -> Path:
        copy = tmp_path / "changed"
        shutil.copytree(folder, copy)
        tensors = load_file(folder / "model.safetensors")
        action(tensors)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return change
