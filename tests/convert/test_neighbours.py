"""Megatron-Bridge's and verl's folders, saved by the real Megatron-Core, are found and read; ours has what others read."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert.conftest import tensors_of
from neighbours_worker import NUM_TOKENS, load_and_save
from tiny_families import FAMILIES, LLAMA3, save_tiny, tiny_model

from nft_megatron.base.errors import UserError
from nft_megatron.config.yaml import dump_yaml
from nft_megatron.convert.bridge_config import run_config
from nft_megatron.convert.commands import check, convert_checkpoint, to_hf, to_megatron
from nft_megatron.weights import read_shape

README = (Path(__file__).parents[2] / "conversion" / "README.md").read_text()
RECIPE = next(text for text in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "load_state_dict" in text)
BUILT = [name for name in FAMILIES if "llama 3" not in name]
"""The scaling of those two begins at 128 positions, which Megatron-Core cannot express."""
FORMS = {"plain": {}, "module.": {"prefix": "module."}, "apart": {"metadata": {"singleton_local_shards": True}}}
MODEL, TOKENIZER = '{"of": "the model"}', '{"of": "the checkpoint"}'


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Each family's Hugging Face folder and its conversion."""
    folder = tmp_path_factory.mktemp("models")
    pairs = {name: (save_tiny(name, folder / name), folder / f"{name} torch_dist") for name in BUILT}
    for hf, converted in pairs.values():
        (hf / "tokenizer.json").write_text(MODEL)
        (hf / "merges.txt").write_text("a b")
        to_megatron(hf, converted)
    return pairs


@pytest.fixture(scope="module")
def loaded(world, models, tmp_path_factory) -> tuple[dict[str, list], Path]:
    """Logits of Megatron's own models, and the folder in which Megatron saved each as ``<name>/<form>``, by ``FORMS``."""
    out = tmp_path_factory.mktemp("saved")
    return world(1)(load_and_save, {name: converted for name, (_, converted) in models.items()}, RECIPE, FORMS, out), out


def same(a: Path, b: Path) -> bool:
    first, second = tensors_of(a), tensors_of(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------------------ ours, as others read it


@pytest.mark.parametrize("name", BUILT)
def test_megatrons_own_model_from_run_config_alone_loads_by_the_readmes_recipe(loaded, name: str):
    with torch.no_grad():
        expected = tiny_model(name)((7 * torch.arange(NUM_TOKENS)[None] + 3) % 131).logits[0]
    assert (torch.tensor(loaded[0][name]) - expected).abs().max() < 1e-4


def test_run_config_is_part_of_what_check_proves(models, tmp_path: Path):
    hf, converted = models["qwen2"]
    copy = shutil.copytree(converted, tmp_path / "copy")
    check(hf, copy)
    text = (copy / "run_config.yaml").read_text()
    (copy / "run_config.yaml").write_text(text.replace("add_qkv_bias: true", "add_qkv_bias: True"))
    with pytest.raises(UserError, match=r"damaged: run_config\.yaml"):
        check(hf, copy)


@pytest.mark.parametrize(("first", "expressed"), [(8192, True), (128, False)])
def test_scaling_that_megatron_cannot_express_is_not_misstated(tmp_path: Path, capsys, first: int, expressed: bool):
    hf = save_tiny("llama 3", tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    rope = next(key for key in ("rope_parameters", "rope_scaling") if config.get(key))
    config[rope] |= LLAMA3 | {"original_max_position_embeddings": first}
    (hf / "config.json").write_text(json.dumps(config))
    to_megatron(hf, tmp_path / "megatron")
    written = tmp_path / "megatron" / "run_config.yaml"
    assert written.is_file() == expressed
    assert ("run_config.yaml for Megatron-Bridge is left out" in capsys.readouterr().out) == (not expressed)
    assert not expressed or "rope_scaling: true\n  rope_scaling_factor: 8.0\n" in written.read_text()


@pytest.mark.parametrize(("dtype", "flag"), [("bfloat16", "bf16"), ("float16", "fp16"), ("float32", None)])
def test_the_dtype_is_stated(models, dtype: str, flag: str | None):
    text = (run_config(read_shape(models["qwen2"][0]), dtype) or b"").decode()
    assert re.findall("(bf16|fp16): true", text) == ([flag] if flag else [])
    assert f"_target_: torch.{dtype}\n" in text


# -------------------------------------------------------------------------------------------- theirs: Megatron-Bridge's folders


@pytest.fixture
def bridge(loaded, models, tmp_path: Path) -> Callable[..., Path]:
    """The root of a Megatron-Bridge checkpoint: what Megatron saved, with the files that Megatron-Bridge adds."""

    def arrange(keeps: bool = True, **sections) -> Path:
        root = tmp_path / "bridge"
        step = shutil.copytree(loaded[1] / "qwen2" / "plain", root / "iter_0000000")
        sections = sections or {"model": {"hf_model_id": str(models["qwen2"][0])}}
        (step / "run_config.yaml").write_text(dump_yaml({"checkpoint": {"ckpt_format": "torch_dist"}, **sections}))
        if keeps:
            (step / "tokenizer").mkdir()
            (step / "tokenizer" / "tokenizer.json").write_text(TOKENIZER)
        (root / "latest_checkpointed_iteration.txt").write_text("0")
        return root

    return arrange


@pytest.mark.parametrize("below", [".", "iter_0000000"])
def test_a_bridge_checkpoint_knows_its_model_and_keeps_its_tokenizer(bridge, models, tmp_path: Path, capsys, below: str):
    root, hf = bridge(), models["qwen2"][0]
    to_hf(root / below, tmp_path / "hf")
    assert same(tmp_path / "hf", hf)
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == TOKENIZER
    assert not (tmp_path / "hf" / "merges.txt").exists()  # not a mixture of two tokenizers
    said = f"config.json is from {hf}, which model.hf_model_id in run_config.yaml names, the tokenizer from"
    assert f"{said} {root / 'iter_0000000' / 'tokenizer'}" in capsys.readouterr().out


@pytest.mark.parametrize("model", [{}, {"hf_model_id": "a/hub-id"}, {"hf_model_id": 5}, "a", None])
def test_a_bridge_checkpoint_may_name_its_model_as_the_tokenizers(bridge, models, tmp_path: Path, model: object):
    tokenizer = {"tokenizer_model": str(models["qwen2"][0])}
    convert_checkpoint(bridge(keeps=False, model=model, tokenizer=tokenizer), tmp_path / "hf")
    assert same(tmp_path / "hf", models["qwen2"][0])
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == MODEL


def test_a_hub_id_is_not_downloaded_and_the_message_says_what_to_pass(bridge, models, tmp_path: Path):
    root, hf = bridge(model={"hf_model_id": "Qwen/Qwen2.5-7B"}), models["qwen2"][0]
    message = (
        r"names the model 'Qwen/Qwen2\.5-7B', which is no model folder here; .*--model; of its files config\.json suffices"
    )
    with pytest.raises(UserError, match=message):
        to_hf(root, tmp_path / "hf")
    (tmp_path / "config").mkdir()
    shutil.copy(hf / "config.json", tmp_path / "config")
    to_hf(root, tmp_path / "hf", model=tmp_path / "config")
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == TOKENIZER
    to_hf(root, tmp_path / "other", model=hf)  # a folder with a tokenizer: as asked for
    assert (tmp_path / "other" / "tokenizer.json").read_text() == MODEL
    check(hf, root)  # the other side's config.json is enough


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "not readable as YAML"),
        ("model: !!python/object/apply:os.system ['touch harm']", "not readable as YAML"),
        ("model: {hf_model_id: 'a\\0b'}", r"has no config\.json"),
        ('model: {hf_model_id: "a\\0b\\x1b[31m"}', r"has no config\.json"),
        ("[]", r"has no config\.json"),
        ("model: {hf_model_id: [1]}", r"has no config\.json"),
        ("#" * (1 << 18) + "\n", r"has 262,145 bytes"),
    ],
    ids=lambda value: value[:20],
)
def test_a_hostile_run_config_is_refused(bridge, tmp_path: Path, monkeypatch, text: str, message: str):
    monkeypatch.chdir(tmp_path)
    root = bridge()
    (root / "iter_0000000" / "run_config.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"SRC = .*{message}.*--model") as refused:
        to_hf(root, tmp_path / "hf")
    assert str(refused.value).isprintable()
    assert not (tmp_path / "harm").exists()


def test_the_only_step_of_a_root_without_tracker(bridge, models, tmp_path: Path):
    root = bridge()
    (root / "latest_checkpointed_iteration.txt").unlink()
    check(models["qwen2"][0], root)
    (root / "iter_0000005").mkdir()
    message = r"holds iter_0000000, iter_0000005 and no latest_checkpointed_iteration\.txt; give the path of one of them"
    with pytest.raises(UserError, match=message):
        to_hf(root, tmp_path / "hf")


# ------------------------------------------------------------------------------------------------------- theirs: verl's folders


@pytest.mark.parametrize("layout", ["", "model"])
@pytest.mark.parametrize("below", ["", "global_step_7", "global_step_7/actor", "global_step_7/actor/{}/dist_ckpt"])
@pytest.mark.parametrize("tracker", [True, False])
def test_verls_folders_are_found_from_above(loaded, models, tmp_path: Path, layout: str, below: str, tracker: bool):
    actor = tmp_path / "verl" / "global_step_7" / "actor"
    shutil.copytree(loaded[1] / "qwen2" / "plain", actor / layout / "dist_ckpt")
    (actor / layout / "huggingface").mkdir()
    shutil.copy(models["qwen2"][0] / "config.json", actor / layout / "huggingface")
    (actor / layout / "huggingface" / "tokenizer.json").write_text(TOKENIZER)
    shutil.copytree(loaded[1] / "qwen3" / "plain", actor.parent / "critic" / layout / "dist_ckpt")  # another model
    if tracker:
        (tmp_path / "verl" / "latest_checkpointed_iteration.txt").write_text("7")
    to_hf(tmp_path / "verl" / below.format(layout), tmp_path / "hf")
    assert same(tmp_path / "hf", models["qwen2"][0])
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == TOKENIZER


def test_verl_may_keep_the_weights_as_a_hugging_face_folder_alone(models, tmp_path: Path):
    shutil.copytree(models["qwen2"][0], tmp_path / "global_step_7" / "actor" / "model" / "huggingface")
    check(tmp_path, models["qwen2"][0])


# --------------------------------------------------------------------------------------- theirs: other forms of Megatron's save


def test_what_megatron_saves_with_a_prefix_converts(loaded, models, tmp_path: Path, capsys):
    to_hf(loaded[1] / "qwen2" / "module.", tmp_path / "hf", model=models["qwen2"][0])
    assert same(tmp_path / "hf", models["qwen2"][0])
    assert "begin with 'module.', which is left out" in capsys.readouterr().out


def test_halves_of_a_weight_are_refused_by_their_name(loaded, models, tmp_path: Path):
    message = r"holds gate and up apart, as _w and _v \(.*linear_fc1\.weight_v\); .*singleton_local_shards"
    with pytest.raises(UserError, match=message):
        to_hf(loaded[1] / "qwen2" / "apart", tmp_path / "hf", model=models["qwen2"][0])
