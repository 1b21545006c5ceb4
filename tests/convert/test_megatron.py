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
LAYOUTS = {"one": (1, 1, 1), "tp4": (4, 1, 1), "pp2": (1, 2, 1), "tp2 pp2": (2, 2, 1), "ep2": (1, 1, 2)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Each family's Hugging Face folder and its conversion."""
    folder = tmp_path_factory.mktemp("models")
    pairs = {}
    for name in FAMILIES:
        pairs[name] = save_tiny(name, folder / name), folder / f"{name} torch_dist"
        to_megatron(*pairs[name])
    return pairs


@pytest.fixture(scope="module", params=LAYOUTS)
def out(request, folders, tmp_path_factory) -> Path:
    """What the ranks of one layout have left."""
    tensor, pipeline, expert = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("out")
    loaded = {name: pair for name, pair in folders.items() if expert == 1 or "moe" in name}
    ended = Ranks(measure, (loaded, folder, tensor, pipeline, expert), tensor * pipeline * expert, folder).wait(200)
    assert ended.returncode == 0, ended.stderr
    return folder


def test_every_rank_loads_its_part_and_nothing_is_left_over(out: Path):
    paths = list(out.glob("*.json"))
    assert paths
    for path in paths:
        findings = json.loads(path.read_text())
        assert findings["different"] == [], path.name
        assert findings["unexpected"] == [], path.name  # asked for by the model, not in the checkpoint
        # Transformer Engine's norms ask for a state that those of this machine do not have.
        assert [key for key in findings["missing"] if "layernorm._extra_state" not in key] == [], path.name


def test_logits_are_those_of_transformers(out: Path):
    for path in out.glob("*_0.json"):
        name, findings = path.stem.removesuffix("_0"), json.loads(path.read_text())
        if "logits" in findings:
            with torch.no_grad():
                tokens = (7 * torch.arange(40) + 3) % 131
                expected = tiny_model(name)(tokens[None]).logits[0]
            assert (torch.tensor(findings["logits"]) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("saved", ["torch_dist", "mp_rank"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_megatron_saves_comes_back_to_the_bit(folders, out: Path, tmp_path: Path, name: str, saved: str):
    if not (out / name / saved).exists():
        pytest.skip("this layout does not save it")
    to_hf(out / name / saved, tmp_path / "hf", model=folders[name][0], max_shard_bytes=40_000)
    expected = load_file(folders[name][0] / "model.safetensors")
    shards = [load_file(path) for path in sorted((tmp_path / "hf").glob("*.safetensors"))]
    actual = {key: tensor for shard in shards for key, tensor in shard.items()}
    assert len(shards) > 1
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype
        assert torch.equal(actual[key], tensor), key
