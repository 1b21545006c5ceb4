"""Converters and a tied model whose checkpoint stores its LM head too: a copy is left out, another head is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from convert.conftest import tensors_of

from nft_megatron.base.errors import UserError
from nft_megatron.convert.commands import check, convert_checkpoint, to_hf, to_megatron
from nft_megatron.weights import read_shape, weight_table
from nft_megatron.weights.table import merge

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
CONSTANTS = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.bias", "model.position_ids")
UNTIE = "set tie_word_embeddings to false"


def add(**more: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], None]:
    """Adds tensors, each computed from the embedding, to a folder's."""

    def action(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: make(tensors[EMBEDDING]) for name, make in more.items()}

    return action


OTHER = add(**{HEAD: lambda embedding: embedding * 2 + 0.1})
COPY = add(**{HEAD: lambda embedding: embedding.clone()})


def test_another_head_is_refused_there_and_by_check(sources, changed, tmp_path: Path, capsys):
    folder = changed(sources["tied"], OTHER)
    for convert in (to_megatron, convert_checkpoint):
        with pytest.raises(UserError, match=rf"SRC = {folder}: {HEAD} differs from {EMBEDDING} in \d+ of .*{UNTIE}"):
            convert(folder, tmp_path / "megatron")
        assert not (tmp_path / "megatron").exists()
    to_megatron(sources["tied"], tmp_path / "megatron")
    for a, b in ((folder, sources["tied"]), (sources["tied"], folder), (folder, tmp_path / "megatron"), (folder, folder)):
        with pytest.raises(UserError, match=rf"bits: {HEAD} differs from {EMBEDDING}.*{UNTIE}"):
            check(a, b)
    assert "are identical" not in capsys.readouterr().out


def test_untied_as_the_remedy_says_it_converts_whole(sources, changed, tmp_path: Path):
    folder = changed(sources["tied"], OTHER)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    to_megatron(folder, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert torch.equal(tensors_of(tmp_path / "hf")[HEAD], tensors_of(folder)[HEAD])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_copy_and_constants_are_left_out_and_mentioned(sources, changed, tmp_path: Path, capsys, dtype: torch.dtype):
    constants = dict.fromkeys(CONSTANTS, lambda embedding: torch.ones(4))
    folder = changed(sources["tied"], add(**{HEAD: lambda embedding: embedding.to(dtype).clone()}, **constants))
    to_megatron(folder, tmp_path / "megatron")
    told = capsys.readouterr().out
    assert f"ignored: {HEAD}, a stored copy of {EMBEDDING}" in told
    assert f"ignored: {len(CONSTANTS)} stored constants" in told
    to_hf(tmp_path / "megatron", tmp_path / "hf")
    before, after = tensors_of(sources["tied"]), tensors_of(tmp_path / "hf")
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    for a, b in ((folder, tmp_path / "megatron"), (tmp_path / "hf", folder)):
        check(a, b)
        told = capsys.readouterr().out
        assert f"{folder}: ignored: {HEAD}" in told and "are identical" in told


def saved(folder: Path, target: Path, kind: str, head: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A Megatron checkpoint of the tied model with a second head, as ``kind`` stores it."""
    tensors = tensors_of(folder)
    entries = weight_table(read_shape(folder)).entries
    state = {
        entry.name: merge(entry, [tensors[name] for name in entry.sources], 1, 0, 131) for entry in entries if entry.exported
    }
    embedding = state["embedding.word_embeddings.weight"]
    if kind == "torch_dist":
        dcp.save(state | {"output_layer.weight": head(embedding)}, checkpoint_id=target, no_dist=True)
        return target
    second = "output_layer.weight" if kind == "mp_rank, output layer" else "embedding.word_embeddings.weight"
    first = {name: tensor for name, tensor in state.items() if not name.startswith(("decoder.layers.1.", "decoder.final"))}
    last = {
        name.replace("layers.1.", "layers.0."): tensor
        for name, tensor in state.items()
        if name.startswith(("decoder.layers.1.", "decoder.final"))
    }
    constant = {"rotary_pos_emb.inv_freq": torch.ones(4)}
    for stage, part in enumerate((first | constant, last | {second: head(embedding)})):
        own = target / f"mp_rank_00_{stage:03d}"
        own.mkdir(parents=True)
        torch.save({"model": part}, own / "model_optim_rng.pt")
    return target


@pytest.mark.parametrize("kind", ["torch_dist", "mp_rank, output layer", "mp_rank, word embeddings"])
def test_back_from_megatron_too(sources, tmp_path: Path, capsys, kind: str):
    tied = sources["tied"]
    good = saved(tied, tmp_path / "good", kind, torch.clone)
    to_hf(good, tmp_path / "hf", model=tied)
    assert "a stored copy of model.embed_tokens.weight" in capsys.readouterr().out
    check(tied, tmp_path / "hf")
    check(good, tied)
    assert tensors_of(tmp_path / "hf").keys() == tensors_of(tied).keys()
    bad = saved(tied, tmp_path / "bad", kind, lambda embedding: embedding + 1)
    with pytest.raises(UserError, match=rf"weight.* differs from {EMBEDDING}.*{UNTIE}"):
        to_hf(bad, tmp_path / "again", model=tied)
    with pytest.raises(UserError, match=rf"bits: .* differs from {EMBEDDING}"):
        check(bad, tied)
    assert not (tmp_path / "again").exists()
