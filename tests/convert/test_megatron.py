"""The real Megatron-Core loads what is converted, under many layouts, and what it saves converts back bit for bit."""

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
from convert_worker import Layout, measure
from safetensors.torch import load_file
from tiny_families import FAMILIES, SIZES, save_tiny, tiny_model

from nft_megatron.convert.commands import to_hf, to_megatron

ALL, MOE, DEEP = tuple(FAMILIES), ("qwen3_moe",), ("qwen2 deep", "llama 3 tied deep", "qwen3_moe deep")
SAVED = ("qwen2 tied", "llama 3", "qwen3_moe")
LAYOUTS = {
    "one": Layout(1, 1, ALL),
    "tp2": Layout(2, 1, ALL),
    "tp4": Layout(4, 1, ALL, SAVED),
    "pp2": Layout(1, 2, ALL),
    "tp2 pp2": Layout(2, 2, ALL, SAVED),
    "tp4 pp2": Layout(4, 2, ALL),
    "cp2": Layout(1, 1, ALL, context=2),
    "pp2 vpp2": Layout(1, 2, DEEP, DEEP, virtual=2),
    "pp3 uneven": Layout(1, 3, DEEP, DEEP, last=2),
    "ep2": Layout(1, 1, MOE, MOE, expert=2),
}
LOADED = [(layout, name) for layout, what in LAYOUTS.items() for name in what.loads]
FORMATS = [
    (layout, name, saved)
    for layout, what in LAYOUTS.items()
    for name in what.saves
    for saved in (("torch_dist", "mp_rank") if what.expert == 1 else ("torch_dist",))
]


def save_deep(name: str, folder: Path) -> Path:
    """Four layers, for two stages of two parts each, or for uneven stages."""
    config_class, model_class, changes = FAMILIES[name.removesuffix(" deep")]
    torch.manual_seed(0)
    model = model_class(config_class(**copy.deepcopy({**SIZES, **changes}) | {"num_hidden_layers": 4}))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Each model's Hugging Face folder and its conversion."""
    folder = tmp_path_factory.mktemp("models")
    pairs = {}
    for name in (*ALL, *DEEP):
        save = save_deep if name in DEEP else save_tiny
        pairs[name] = save(name, folder / name), folder / f"{name} torch_dist"
        to_megatron(*pairs[name])
    return pairs


@pytest.fixture(scope="module")
def out_of(world, folders, tmp_path_factory):
    """Where the ranks of a layout have left their findings; they are asked once."""

    @functools.cache
    def measured(name: str) -> Path:
        out = tmp_path_factory.mktemp("out")
        world(LAYOUTS[name].num_ranks)(measure, LAYOUTS[name], folders, out)
        return out

    return measured


@pytest.mark.parametrize(("layout", "name"), LOADED)
def test_every_rank_loads_its_part_and_nothing_is_left_over(out_of, layout: str, name: str):
    for rank in range(LAYOUTS[layout].num_ranks):
        findings = json.loads((out_of(layout) / f"{name}_{rank}.json").read_text())
        assert findings["different"] == []
        assert findings["unexpected"] == []  # asked for by the model, not in the checkpoint
        # Transformer Engine's norms ask for a state that those of this machine do not have.
        assert [key for key in findings["missing"] if "layernorm._extra_state" not in key] == []


@pytest.mark.parametrize("name", ALL)
def test_logits_are_those_of_transformers(out_of, name: str):
    findings = json.loads((out_of("one") / f"{name}_0.json").read_text())
    with torch.no_grad():
        tokens = (7 * torch.arange(40) + 3) % 131
        expected = tiny_model(name)(tokens[None]).logits[0]
    assert (torch.tensor(findings["logits"]) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("layout", "name", "saved"), FORMATS)
def test_what_megatron_saves_comes_back_to_the_bit(folders, out_of, tmp_path: Path, layout: str, name: str, saved: str):
    to_hf(out_of(layout) / name / saved, tmp_path / "hf", model=folders[name][0], max_shard_bytes=40_000)
    expected = load_file(folders[name][0] / "model.safetensors")
    shards = [load_file(path) for path in sorted((tmp_path / "hf").glob("*.safetensors"))]
    actual = {key: tensor for shard in shards for key, tensor in shard.items()}
    assert len(shards) > 1
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype
        assert torch.equal(actual[key], tensor), key
