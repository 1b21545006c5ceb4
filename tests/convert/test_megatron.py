"""The real Megatron-Core loads what is converted, under several layouts, and what it saves is converted back to the bit."""

import json
from pathlib import Path

import pytest
import torch
from convert_worker import measure
from launcher import Ranks
from safetensors.torch import load_file
from tiny_families import save_tiny, tiny_model

from nft_megatron.convert.commands import to_hf, to_megatron

FAMILIES = ["qwen2", "qwen2 tied", "llama 3", "qwen3_moe"]
LAYOUTS = [(1, 1), (4, 1), (1, 2), (2, 2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Each family's Hugging Face folder and its conversion."""
    folder = tmp_path_factory.mktemp("models")
    pairs = {}
    for name in FAMILIES:
        pairs[name] = save_tiny(name, folder / name), folder / f"{name} torch_dist"
        to_megatron(*pairs[name])
    return pairs


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: f"tp{layout[0]} pp{layout[1]}")
def out(request, folders, tmp_path_factory) -> Path:
    """What the ranks of one layout have left."""
    tensor, pipeline = request.param
    folder = tmp_path_factory.mktemp("out")
    ended = Ranks(measure, (folders, folder, tensor, pipeline), tensor * pipeline, folder).wait(200)
    assert ended.returncode == 0, ended.stderr
    return folder


def test_every_rank_loads_its_part_and_nothing_is_left_over(out: Path):
    for path in out.glob("*.json"):
        findings = json.loads(path.read_text())
        assert findings["different"] == [], path.name
        assert findings["unexpected"] == [], path.name  # asked for by the model, not in the checkpoint
        # Transformer Engine's norms ask for a state that those of this machine do not have.
        assert [key for key in findings["missing"] if "layernorm._extra_state" not in key] == [], path.name


def test_logits_are_those_of_transformers(out: Path):
    for name in FAMILIES:
        findings = json.loads((out / f"{name}_0.json").read_text())
        if "logits" in findings:
            with torch.no_grad():
                tokens = (7 * torch.arange(40) + 3) % 131
                expected = tiny_model(name)(tokens[None]).logits[0]
            assert (torch.tensor(findings["logits"]) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("saved", ["torch_dist", "mp_rank"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_megatron_saves_comes_back_to_the_bit(folders, out: Path, tmp_path: Path, name: str, saved: str):
    to_hf(out / name / saved, tmp_path / "hf", model=folders[name][0], max_shard_bytes=40_000)
    expected = load_file(folders[name][0] / "model.safetensors")
    shards = [load_file(path) for path in sorted((tmp_path / "hf").glob("*.safetensors"))]
    actual = {key: tensor for shard in shards for key, tensor in shard.items()}
    assert len(shards) > 1
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype
        assert torch.equal(actual[key], tensor), key
