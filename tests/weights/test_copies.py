"""What folders store besides the model: a second LM head, which must be a copy of the embedding, and constants."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import save_tiny

from nft_megatron.base.errors import UserError
from nft_megatron.weights import copies, read_shape, weight_table
from nft_megatron.weights.hf_reader import HFReader

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
CONSTANTS = (
    "model.layers.0.self_attn.rotary_emb.inv_freq",  # Llama 2 as published
    "model.layers.1.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.cos_cached",
    "model.layers.0.self_attn.rotary_emb.sin_cached",
    "model.layers.0.self_attn.masked_bias",
    "model.layers.0.self_attn.bias",
    "transformer.h.3.attn.bias",
    "transformer.h.3.attn.masked_bias",
    "model.embeddings.position_ids",
)


def one_more(head: torch.Tensor) -> torch.Tensor:
    """The next bfloat16 in the last element."""
    head = head.clone()
    head.view(torch.int16)[-1, -1] += 1
    return head


SAME = {
    "bit-equal": lambda head: head.clone(),
    "in float32": lambda head: head.float(),
    "in float64": lambda head: head.double(),
}
DIFFERENT = {
    "scaled": lambda head: head * 2 + 0.1,
    "one element by one bit": one_more,
    "in float32, with more digits": lambda head: head.float() + 1e-6,
    "rows in another order": lambda head: head.flip(0),
    "NaN": lambda head: torch.where(torch.arange(head.numel()).view_as(head) == 7, torch.nan, head),
    "fewer rows": lambda head: head[:-1].clone(),
    "transposed": lambda head: head.T.contiguous(),
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    folder = save_tiny("qwen2 tied", tmp_path_factory.mktemp("tied"))
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def with_tensors(folder: Path, target: Path, more: dict[str, torch.Tensor], sharded: bool = False) -> Path:
    """A copy of ``folder`` that also stores ``more``, in a file of its own if ``sharded``."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    if not sharded:
        save_file(tensors | more, target / "model.safetensors")
        return target
    (target / "model.safetensors").unlink()
    save_file(tensors, target / "first.safetensors")
    save_file(more, target / "second.safetensors")
    weight_map = dict.fromkeys(tensors, "first.safetensors") | dict.fromkeys(more, "second.safetensors")
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target


def notes_of(folder: Path) -> tuple[str, ...]:
    with HFReader(folder) as reader:
        return reader.check(weight_table(read_shape(folder)))


@pytest.mark.parametrize("name", SAME)
def test_a_copy_is_ignored_with_a_note(tied: Path, tmp_path: Path, name: str):
    head = SAME[name](load_file(tied / "model.safetensors")[EMBEDDING])
    folder = with_tensors(tied, tmp_path / "model", {HEAD: head}, sharded=name == "in float32")
    assert notes_of(folder) == (f"ignored: {HEAD}, a stored copy of {EMBEDDING}, to which config.json ties it",)
    assert notes_of(tied) == ()


def test_a_copy_may_be_rounded_but_may_not_know_more(tmp_path: Path):
    folder = save_tiny("qwen2 tied", tmp_path / "float32")
    embedding = load_file(folder / "model.safetensors")[EMBEDDING]
    assert embedding.dtype == torch.float32
    assert len(notes_of(with_tensors(folder, tmp_path / "rounded", {HEAD: embedding.bfloat16()}))) == 1
    with pytest.raises(UserError, match="differs from"):
        notes_of(with_tensors(folder, tmp_path / "other", {HEAD: embedding.bfloat16() * 2}))


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_head_of_its_own_is_refused(tied: Path, tmp_path: Path, monkeypatch, name: str):
    monkeypatch.setattr(copies, "_BAND_BYTES", 4 * 32 * 10)  # ten rows at a time
    head = DIFFERENT[name](load_file(tied / "model.safetensors")[EMBEDDING])
    folder = with_tensors(tied, tmp_path / "model", {HEAD: head}, sharded=name == "scaled")
    with pytest.raises(UserError) as raised:
        notes_of(folder)
    message = str(raised.value)
    assert message.startswith(f"model.path = {folder}: {HEAD} ")
    assert "set tie_word_embeddings to false in its config.json" in message and "\n" not in message
    if head.shape != (131, 32):
        assert f"has shape {list(head.shape)}, but {EMBEDDING} has [131, 32]" in message
    if name == "one element by one bit":
        assert "in 1 of 4192 elements (first at [130, 31]: " in message


def test_the_remedy_helps(tied: Path, tmp_path: Path):
    head = load_file(tied / "model.safetensors")[EMBEDDING] * 2
    folder = with_tensors(tied, tmp_path / "model", {HEAD: head})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert notes_of(folder) == ()
    with HFReader(folder) as reader:
        assert torch.equal(reader.read(HEAD, 0, 0, 131), head)


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_ignored_with_a_note(tied: Path, tmp_path: Path, name: str):
    folder = with_tensors(tied, tmp_path / "model", {name: torch.rand(2)})
    assert notes_of(folder) == (f"ignored: 1 stored constant that config.json implies, such as {name}",)


def test_many_constants_are_one_line(tied: Path, tmp_path: Path):
    folder = with_tensors(tied, tmp_path / "model", {name: torch.rand(2) for name in CONSTANTS})
    (note,) = notes_of(folder)
    assert note.startswith(f"ignored: {len(CONSTANTS)} stored constants that config.json implies, such as model.embeddings.")


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.o_proj.bias", "model.layers.0.mlp.bias", "v_head.weight", "inv_freq_scale", "bias"]
)
def test_other_tensors_are_still_refused(tied: Path, tmp_path: Path, name: str):
    with pytest.raises(UserError, match=f"holds an unexpected tensor {name}"):
        notes_of(with_tensors(tied, tmp_path / "model", {name: torch.rand(2)}))
