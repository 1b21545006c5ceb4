"""Conversions there and back, and every fault that a user may meet: found, named, and nothing half-written left."""

import errno
import itertools
import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from convert.conftest import tensors_of
from safetensors.torch import load_file
from tiny_families import FAMILIES, save_tiny

from nft_megatron.convert import torch_dist_plan
from nft_megatron.convert.commands import check, to_hf, to_megatron
from nft_megatron.convert.manifest import Manifest, read_manifest
from nft_megatron.errors import UserError
from nft_megatron.weights import read_shape, weight_table
from nft_megatron.weights.receipt import weights_receipt


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
    receipts = {read_manifest(tmp_path / folder, "").receipt for folder in ("megatron", "hf")}
    assert receipts == {weights_receipt(before.items())}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_there_and_back(tmp_path: Path, family: str):
    save_tiny(family, tmp_path / "source")
    to_megatron(tmp_path / "source", tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "hf")
    before, after = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "hf")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


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
    assert content["receipt"] is None
    assert {(record["sha256"], record["non_finite"]) for record in content["tensors"].values()} == {(None, None)}
    with pytest.raises(UserError, match=r"2 problems in .*non-finite"):  # on both sides, and no hash is missed
        check(source, tmp_path / "megatron")
    assert "B was converted without proof" in capsys.readouterr().out
    to_hf(tmp_path / "megatron", tmp_path / "hf")  # what is unproven is proven from here on
    after, before = tensors_of(tmp_path / "hf"), tensors_of(source)
    assert read_manifest(tmp_path / "hf", "").receipt == weights_receipt(before.items()) == weights_receipt(after.items())


def test_a_dry_run_prints_the_mapping_and_writes_nothing(sources, tmp_path: Path, capsys):
    to_megatron(sources["untied"], tmp_path / "megatron", dry_run=True)
    output = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    key = "decoder.layers.self_attention.linear_qkv.weight"
    assert f"model.layers.1.self_attn.k_proj.weight  [16, 32] bfloat16  {key}[1], qkv part 2 of 3\n" in output
    assert output.count("\n") == len(tensors_of(sources["untied"])) + 1


# ------------------------------------------------------------------------------------------------------ faults of a source


def add_nan(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][5, 17] = float("nan")


FAULTS = {
    "missing": (lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias"), r"1\.self_attn\.k_proj\.bias is not in"),
    "unexpected": (
        lambda tensors: tensors.update({"model.layers.2.extra": torch.ones(1)}),
        r"model\.layers\.2\.extra is in .*model\.safetensors but not in",
    ),
    "shape": (
        lambda tensors: tensors.update({"lm_head.weight": torch.ones(130, 32)}),
        r"lm_head.weight has shape \[130, 32\] in .*model.safetensors, config.json implies \[131, 32\]",
    ),
    "not finite": (add_nan, r"model.safetensors: model.layers.1.mlp.up_proj.weight is not finite at \[5, 17\]"),
    "dtypes within a parameter": (
        lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32)}),
        "gate_proj.weight is bfloat16, model.layers.0.mlp.up_proj.weight is float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder_is_refused_and_nothing_appears(sources, changed, tmp_path: Path, fault: str):
    action, message = FAULTS[fault]
    with pytest.raises(UserError, match=message):
        to_megatron(changed(sources["untied"], action), tmp_path / "megatron", strict=True)
    assert not list(tmp_path.glob("megatron*"))


def test_metadata_pickled_by_an_older_python_is_read(sources, tmp_path: Path):
    """Before 3.11.4 members of an enumeration are pickled as a call of getattr."""
    from torch.distributed.checkpoint import metadata

    class OlderPickler(pickle.Pickler):
        def reducer_override(self, value):
            older = isinstance(value, metadata._MEM_FORMAT_ENCODING)
            return (getattr, (type(value), value.name)) if older else NotImplemented

    to_megatron(sources["untied"], tmp_path / "megatron")
    path = tmp_path / "megatron" / ".metadata"
    content = pickle.loads(path.read_bytes())
    with path.open("wb") as file:
        OlderPickler(file).dump(content)
    (tmp_path / "megatron" / "conversion.json").unlink()
    check(sources["untied"], tmp_path / "megatron")


def test_nan_is_copied_reported_and_recorded(sources, changed, tmp_path: Path, capsys):
    """The round trip keeps the value and says where it is each time; check calls it a problem, as does --strict."""
    name, source = "model.layers.1.mlp.up_proj.weight", changed(sources["untied"], add_nan)
    to_megatron(source, tmp_path / "megatron")
    assert f"warning: {name} is not finite at [5, 17]" in capsys.readouterr().out
    to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert f"warning: {name} is not finite at [5, 17]" in capsys.readouterr().out
    record = json.loads((tmp_path / "hf" / "conversion.json").read_text())["tensors"][name]
    assert record["non_finite"] == [5, 17]
    after, before = tensors_of(tmp_path / "hf")[name], tensors_of(source)[name]
    assert torch.equal(after.view(torch.int16), before.view(torch.int16))
    with pytest.raises(UserError, match=f"non-finite: {name}"):
        check(source, tmp_path / "hf")
    with pytest.raises(UserError, match=r"is not finite at \[5, 17\]"):
        to_hf(tmp_path / "megatron", tmp_path / "again", strict=True)


def test_one_float32_tensor_is_kept_and_reported(sources, changed, tmp_path: Path, capsys):
    name = "model.layers.1.input_layernorm.weight"
    source = changed(sources["untied"], lambda tensors: tensors.update({name: tensors[name].float() + 1e-6}))
    to_megatron(source, tmp_path / "megatron")
    assert f"kept as they are: {name}\n" in capsys.readouterr().out
    to_hf(tmp_path / "megatron", tmp_path / "hf")
    after = tensors_of(tmp_path / "hf")[name]
    assert after.dtype == torch.float32
    assert torch.equal(after, tensors_of(source)[name])
    with pytest.raises(UserError, match=f"dtype: {name} is bfloat16 in A and float32 in B"):
        check(sources["untied"], tmp_path / "hf")


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def converted(sources, tmp_path: Path) -> Path:
    to_megatron(sources["untied"], tmp_path / "converted")
    return tmp_path / "converted"


def position_of(folder: Path, tensor: torch.Tensor) -> int:
    position = (folder / "__0_0.distcp").read_bytes().find(tensor.view(torch.uint8).numpy().tobytes())
    assert position > 0
    return position


def test_one_flipped_bit_is_found(sources, converted: Path, tmp_path: Path):
    name = "model.layers.1.mlp.down_proj.weight"
    flip(converted / "__0_0.distcp", position_of(converted, tensors_of(sources["untied"])[name]) + 2 * (48 * 3 + 5))
    with pytest.raises(UserError, match=rf"__0_0.distcp: is damaged: {name} does not have the hash"):
        to_hf(converted, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    with pytest.raises(UserError, match=rf"bits: {name} differs in 1 of 1536 elements, first at \[3, 5\]"):
        check(sources["untied"], converted)
    with pytest.raises(UserError, match=rf"damaged: {name} in .*__0_0.distcp \(A\) does not have the hash"):
        check(converted, converted)


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "common.pt", "tokenizer.json", "chat_template.jinja"])
def test_a_flipped_bit_outside_all_tensors_is_found(converted: Path, file: str):
    position = (converted / file).read_bytes().find(b"archive") if file.endswith("distcp") else 8
    flip(converted / file, position)
    message = (
        r"\.metadata: is not what conversion.json recorded" if file == ".metadata" else rf"damaged: {file} of A is not what"
    )
    with pytest.raises(UserError, match=message):
        check(converted, converted)


def test_a_checkpoint_without_manifest_is_proven_by_the_checksums_in_its_archives(sources, tmp_path: Path):
    """As Megatron saves: here by torch's own writer. Megatron itself loads such a file without a word."""
    import torch.distributed.checkpoint as dcp

    state = {}
    tensors = tensors_of(sources["untied"])
    to_megatron(sources["untied"], tmp_path / "converted")
    dcp_state = dcp.FileSystemReader(tmp_path / "converted").read_metadata().state_dict_metadata
    state = {
        key: torch.empty(value.size, dtype=value.properties.dtype) for key, value in dcp_state.items() if hasattr(value, "size")
    }
    dcp.load(state, checkpoint_id=tmp_path / "converted", no_dist=True)
    dcp.save(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    to_hf(tmp_path / "saved", tmp_path / "hf", model=sources["untied"])
    assert all(torch.equal(tensors_of(tmp_path / "hf")[key], tensor) for key, tensor in tensors.items())
    (file,) = (tmp_path / "saved").glob("*.distcp")
    wanted = tensors["lm_head.weight"].view(torch.uint8).numpy().tobytes()
    flip(file, file.read_bytes().find(wanted) + 1001)
    with pytest.raises(UserError, match=rf"{file.name}: is damaged: the bytes of lm_head.weight do not have the checksum"):
        to_hf(tmp_path / "saved", tmp_path / "again", model=sources["untied"])


def test_truncated_and_missing_files(sources, converted: Path, tmp_path: Path):
    distcp = converted / "__0_0.distcp"
    content = distcp.read_bytes()
    distcp.write_bytes(content[:-2000])
    with pytest.raises(UserError, match=r"__0_0.distcp: is truncated"):
        to_hf(converted, tmp_path / "hf")
    distcp.unlink()
    with pytest.raises(UserError, match=r"lacks its file __0_0.distcp"):
        to_hf(converted, tmp_path / "hf")
    distcp.write_bytes(content)
    (converted / ".metadata").write_bytes((converted / ".metadata").read_bytes()[:-50])
    (converted / "conversion.json").unlink()
    with pytest.raises(UserError, match="is no metadata of a torch_dist checkpoint"):
        to_hf(converted, tmp_path / "hf")
    shutil.copytree(sources["untied"], tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes((tmp_path / "cut" / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model.safetensors: is not a whole safetensors file"):
        to_megatron(tmp_path / "cut", tmp_path / "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 140}, r"embedding.word_embeddings.weight has shape \[131, 32\], config.json implies \[140, 32\]"),
        ({"num_hidden_layers": 3}, r"linear_qkv.weight has shape \[2, 64, 32\], config.json implies \[3, 64, 32\]"),
        ({"intermediate_size": 64}, r"linear_fc1.weight has shape \[2, 96, 32\], config.json implies \[2, 128, 32\]"),
        ({"tie_word_embeddings": True}, "output_layer.weight is a key of .* but not of the model"),
        ({"architectures": ["Qwen3ForCausalLM"], "head_dim": 4}, "q_norm.weight is not in|linear_qkv.bias is a key"),
        ({"architectures": ["BloomForCausalLM"]}, "no such model family"),
    ],
    ids=["vocabulary", "layers", "MLP", "tied", "family", "architecture"],
)
def test_a_config_of_another_model(converted: Path, tmp_path: Path, changes: dict, message: str):
    edit_config(converted, **changes)
    with pytest.raises(UserError, match=message):
        to_hf(converted, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_check_lists_everything(sources, changed, tmp_path: Path, capsys):
    def spoil(tensors):
        tensors.pop("model.norm.weight")
        tensors["new"] = torch.ones(2)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
        tensors["model.layers.0.mlp.gate_proj.weight"] = torch.ones(47, 32, dtype=torch.bfloat16)
        tensors["model.layers.0.input_layernorm.weight"][3] += 1
        add_nan(tensors)

    with pytest.raises(UserError, match=r"problems in comparison"):
        check(sources["untied"], changed(sources["untied"], spoil))
    found = {tuple(line.split()[:2]) for line in capsys.readouterr().out.splitlines()}
    assert found == {
        ("missing:", "model.norm.weight"), ("unexpected:", "new"), ("dtype:", "lm_head.weight"),
        ("shape:", "model.layers.0.mlp.gate_proj.weight"), ("bits:", "model.layers.0.input_layernorm.weight"),
        ("bits:", "model.layers.1.mlp.up_proj.weight"), ("non-finite:", "model.layers.1.mlp.up_proj.weight"),
    }  # fmt: skip


def test_check_of_other_settings(sources, tmp_path: Path):
    shutil.copytree(sources["tied"], tmp_path / "other")
    edit_config(tmp_path / "other", rms_norm_eps=1e-3)
    with pytest.raises(UserError, match=r"config: norm_epsilon is 1e-05 in A, 0\.001 in B"):
        check(sources["tied"], tmp_path / "other")


def test_log_probs_of_a_prompt(model_folder, tmp_path: Path, capsys):
    to_megatron(model_folder, tmp_path / "megatron")
    check(model_folder, tmp_path / "megatron", prompt="What is 1 + 2")
    assert "log-probs of" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- exit codes


def test_an_existing_name_and_a_second_process_are_refused(sources, converted: Path, tmp_path: Path):
    import fcntl

    with pytest.raises(UserError, match="exists already"):
        to_megatron(sources["untied"], converted)
    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / "journal.jsonl").open("a") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="being written by another process"):
            to_megatron(sources["untied"], tmp_path / "out")


def test_exit_codes_and_messages(command, sources, changed, tmp_path: Path):
    assert command("convert", "to-megatron", sources["untied"], tmp_path / "megatron").returncode == 0
    same = command("convert", "check", sources["untied"], tmp_path / "megatron")
    assert same.returncode == 0
    assert "are the same" in same.stdout
    bad = command("convert", "to-megatron", changed(sources["untied"], add_nan), tmp_path / "x", "--strict")
    assert bad.returncode == 2
    assert "is not finite at [5, 17]" in bad.stderr
    assert "Traceback" not in bad.stderr
    different = command("convert", "check", tmp_path / "changed", tmp_path / "megatron")
    assert different.returncode == 2
    assert "non-finite: model.layers.1.mlp.up_proj.weight at [5, 17]" in different.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root: run the tests as root to include this one")
def test_a_full_disk_says_so_and_the_same_command_goes_on(sources, command, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here ({mounted.stderr.strip()}): run where mount is allowed")
    try:
        full = command("convert", "to-megatron", sources["untied"], disk / "out")
        assert full.returncode == 75, full.stderr
        assert "No space left on device" in full.stderr
        assert "are needed" in full.stderr
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=4M", disk], check=True)
        assert command("convert", "to-megatron", sources["untied"], disk / "out").returncode == 0
        check(sources["untied"], disk / "out")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_up_meanwhile(sources, tmp_path: Path, monkeypatch):
    from nft_megatron.convert import engine

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(engine.os, "pwrite", fail)
        with pytest.raises(OSError, match="No space left") as caught:
            to_megatron(sources["untied"], tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert "__0_0.distcp" in str(caught.value.filename)
    to_megatron(sources["untied"], tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------------- planning


def test_the_plan_of_a_32b_model_is_small_and_quick(tmp_path: Path):
    """64 layers, 65 GB: memory grows with the number of tensors, not with their bytes."""
    import tracemalloc

    config = {
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
        "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    table = weight_table(read_shape(tmp_path))
    tracemalloc.start()
    target = torch_dist_plan.plan_torch_dist(tmp_path, table, dict.fromkeys(table.shapes, torch.bfloat16))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    num_parameters = 32_763_876_352  # as Qwen2.5-32B's model card and index have it
    assert sum(tensor.num_bytes for tensor in target.tensors.values()) == 2 * num_parameters
    assert 0 < target.num_bytes - 2 * num_parameters < 10e6
    assert max(target.files.values()) <= torch_dist_plan.MAX_FILE_BYTES
    assert peak < 40e6
    ranges = sorted(
        (block.file, block.offset, block.num_rows * block.width)
        for tensor in target.tensors.values()
        for block in tensor.blocks
    )
    parts = sorted((file, offset, len(data)) for file, offset, data in target.parts)
    everything = sorted([*ranges, *parts])
    for (file, offset, length), (next_file, next_offset, _) in itertools.pairwise(everything):
        assert next_offset == (offset + length if next_file == file else 0)


def test_a_manifest_that_contradicts_itself(converted: Path):
    path = converted / "conversion.json"
    content = json.loads(path.read_text())
    content["tensors"]["lm_head.weight"]["sha256"] = "0" * 64
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="its receipt does not belong to its tensors"):
        read_manifest(converted, "SRC")
    assert isinstance(Manifest({}, {}, {}).receipt, str)


def test_safetensors_reads_what_is_written(sources, converted: Path, tmp_path: Path):
    to_hf(converted, tmp_path / "hf", max_shard_bytes=15_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "hf" / file)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(sources["untied"]).values())
