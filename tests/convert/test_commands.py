"""Conversions there and back: every bit, every family, every option."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from convert.conftest import add_nan, cut_into_eight, tensors_of
from safetensors.torch import load_file
from tiny_families import FAMILIES, save_tiny

from nft_megatron.base.errors import UserError
from nft_megatron.convert import engine, torch_dist_plan
from nft_megatron.convert.commands import check, to_hf, to_megatron
from nft_megatron.convert.manifest import Manifest, read_manifest
from nft_megatron.weights.fingerprint import weights_fingerprint


@pytest.mark.parametrize("name", ["untied", "tied", "sharded"])
def test_there_and_back_is_the_same_to_the_bit(sources, tmp_path: Path, name: str):
    to_megatron(sources[name], tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "hf")
    before, after = tensors_of(sources[name]), tensors_of(tmp_path / "hf")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        assert torch.equal(after[key], tensor), key
    for file in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / file).read_bytes() == (sources[name] / file).read_bytes()
    fingerprints = {read_manifest(tmp_path / folder, "").fingerprint for folder in ("megatron", "hf")}
    assert fingerprints == {weights_fingerprint(before.items())}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_there_and_back_from_one_file_and_from_eight(tmp_path: Path, family: str):
    save_tiny(family, tmp_path / "source")
    cut_into_eight(tmp_path / "source", tmp_path / "shards")
    for source in ("source", "shards"):
        to_megatron(tmp_path / source, tmp_path / f"{source} megatron")
        to_hf(tmp_path / f"{source} megatron", tmp_path / f"{source} hf")
        before, after = tensors_of(tmp_path / source), tensors_of(tmp_path / f"{source} hf")
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    for path in (tmp_path / "source megatron").iterdir():  # what test_megatron.py loads is the same, whatever it came from
        if path.name != "conversion.json":
            assert path.read_bytes() == (tmp_path / "shards megatron" / path.name).read_bytes(), path.name


def test_many_small_chunks_and_files(sources, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(torch_dist_plan, "MAX_CHUNK_BYTES", 500)
    monkeypatch.setattr(torch_dist_plan, "MAX_FILE_BYTES", 20_000)
    to_megatron(sources["untied"], tmp_path / "megatron")
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) > 3
    to_hf(tmp_path / "megatron", tmp_path / "hf", max_shard_bytes=10_000)
    before, after = tensors_of(sources["untied"]), tensors_of(tmp_path / "hf")
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    check(tmp_path / "megatron", tmp_path / "hf")


def test_workers_do_not_change_a_byte(sources, tmp_path: Path):
    for workers in (1, 3):
        to_megatron(sources["tied"], tmp_path / str(workers), workers=workers)
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "3" / path.name).read_bytes(), path.name


def test_what_is_written_is_sent_to_the_disk_at_once_and_its_pages_given_back(sources, tmp_path: Path, monkeypatch):
    """Each range is advised when it is written, and again sixteen writes later."""
    advised = []
    advise = os.posix_fadvise
    to_megatron(sources["untied"], tmp_path / "expected")
    monkeypatch.setattr(engine, "_WRITEBACK_BYTES", 1)
    monkeypatch.setattr(engine.os, "posix_fadvise", lambda *arguments: advised.append(arguments) or advise(*arguments))
    to_megatron(sources["untied"], tmp_path / "megatron", workers=1)
    (file,) = (tmp_path / "megatron").glob("*.distcp")
    assert file.read_bytes() == (tmp_path / "expected" / file.name).read_bytes()
    assert {advice for *_, advice in advised} == {os.POSIX_FADV_DONTNEED}
    times = Counter((offset, num_bytes) for _, offset, num_bytes, _ in advised)
    assert sum(num_bytes for _, num_bytes in times) == file.stat().st_size
    first, last = list(times)[:-16], list(times)[-16:]
    assert {times[place] for place in first} == {2}
    assert {times[place] for place in last} == {1}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_cast_on_request_is_torchs_and_on_record(sources, tmp_path: Path, capsys, dtype: str):
    to_megatron(sources["untied"], tmp_path / "megatron", dtype=dtype)
    to_hf(tmp_path / "megatron", tmp_path / "hf")
    for key, tensor in tensors_of(sources["untied"]).items():
        assert torch.equal(tensors_of(tmp_path / "hf")[key], tensor.to(getattr(torch, dtype))), key
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == dtype
    check(sources["untied"], tmp_path / "megatron")  # the manifest says that B was cast
    with pytest.raises(UserError, match=f"dtype: .* is bfloat16 in A and {dtype} in B"):
        check(sources["untied"], tmp_path / "hf")  # this one's does not: it was float already
    assert capsys.readouterr().out.count("dtype: ") == len(tensors_of(sources["untied"]))


def test_without_proof_the_bytes_are_the_same_and_the_manifest_says_so(sources, changed, tmp_path: Path, capsys):
    source = changed(sources["untied"], add_nan)
    with pytest.raises(UserError, match="--no-proof = with --strict"):
        to_megatron(source, tmp_path / "megatron", strict=True, proof=False)
    with pytest.raises(UserError, match="is not finite"):
        to_megatron(source, tmp_path / "megatron", strict=True)
    to_megatron(source, tmp_path / "proven")
    to_megatron(source, tmp_path / "megatron", proof=False)
    assert "bytes, unproven: neither hashed nor searched" in capsys.readouterr().out
    for path in (tmp_path / "proven").iterdir():
        if path.name != "conversion.json":
            assert path.read_bytes() == (tmp_path / "megatron" / path.name).read_bytes(), path.name
    content = json.loads((tmp_path / "megatron" / "conversion.json").read_text())
    assert content["fingerprint"] is None
    assert {(record["sha256"], record["non_finite"]) for record in content["tensors"].values()} == {(None, None)}
    with pytest.raises(UserError, match=r"2 problems compared with .*non-finite"):  # on both sides, and no hash is missed
        check(source, tmp_path / "megatron")
    assert "B was converted without proof" in capsys.readouterr().out
    to_hf(tmp_path / "megatron", tmp_path / "hf")  # what is unproven is proven from here on
    after, before = tensors_of(tmp_path / "hf"), tensors_of(source)
    assert (
        read_manifest(tmp_path / "hf", "").fingerprint
        == weights_fingerprint(before.items())
        == weights_fingerprint(after.items())
    )


def test_a_dry_run_prints_the_mapping_and_writes_nothing(sources, tmp_path: Path, capsys):
    to_megatron(sources["untied"], tmp_path / "megatron", dry_run=True)
    output = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    key = "decoder.layers.self_attention.linear_qkv.weight"
    assert f"model.layers.1.self_attn.k_proj.weight  [16, 32] bfloat16  {key}[1], qkv part 2 of 3\n" in output
    assert output.count("\n") == len(tensors_of(sources["untied"])) + 1


# ----------------------------------------------------------------------------------------------------------------- planning


def test_a_manifest_that_contradicts_itself(converted: Path):
    path = converted / "conversion.json"
    content = json.loads(path.read_text())
    content["tensors"]["lm_head.weight"]["sha256"] = "0" * 64
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="its fingerprint does not match its tensors"):
        read_manifest(converted, "SRC")
    assert isinstance(Manifest({}, {}, {}).fingerprint, str)


def test_safetensors_reads_what_is_written(sources, converted: Path, tmp_path: Path):
    to_hf(converted, tmp_path / "hf", max_shard_bytes=15_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "hf" / file)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(sources["untied"]).values())
