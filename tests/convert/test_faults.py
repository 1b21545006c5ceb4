"""Every fault that a user may meet, in both directions: found, named, and nothing half-written left."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from convert.conftest import add_nan, tensors_of
from small_disk import enlarge

from nft_megatron.base.errors import UserError
from nft_megatron.convert import engine, torch_dist_plan
from nft_megatron.convert.commands import check, to_hf, to_megatron

FAULTS = {
    "missing": (lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias"), r"1\.self_attn\.k_proj\.bias is not in"),
    "unexpected": (
        lambda tensors: tensors.update({"model.layers.2.extra": torch.ones(1)}),
        r"model\.layers\.2\.extra is in .*model\.safetensors but not in",
    ),
    "shape": (
        lambda tensors: tensors.update({"lm_head.weight": torch.ones(130, 32)}),
        r"lm_head.weight has shape \[130, 32\] in .*model.safetensors, but config.json implies \[131, 32\]",
    ),
    "not finite": (add_nan, r"model.safetensors: model.layers.1.mlp.up_proj.weight is not finite at \[5, 17\]"),
    "dtypes within a parameter": (
        lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32)}),
        "gate_proj.weight is bfloat16, model.layers.0.mlp.up_proj.weight is float32",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder_is_refused_and_nothing_appears(sources, changed, tmp_path: Path, fault: str):
    action, message = FAULTS[fault]
    with pytest.raises(UserError, match=message):
        to_megatron(changed(sources["untied"], action), tmp_path / "megatron", strict=True)
    assert not list(tmp_path.glob("megatron*"))


def test_metadata_pickled_by_an_older_python_is_read(sources, tmp_path: Path):
    """Before 3.11.4 enumeration members are pickled as a call of getattr."""
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
    assert f"kept unchanged: {name}\n" in capsys.readouterr().out
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


def edit_index(folder: Path, **places: str) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"] |= places
    path.write_text(json.dumps(content))


def edit_metadata(folder: Path, action) -> None:
    """Of a checkpoint without manifest, as Megatron's own are."""
    path = folder / ".metadata"
    content = pickle.loads(path.read_bytes())
    action(content)
    path.write_bytes(pickle.dumps(content))
    (folder / "conversion.json").unlink()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def cut_metadata_short(folder: Path) -> None:
    cut_short(folder / ".metadata")
    (folder / "conversion.json").unlink()


def misplace_final_norm(content) -> None:
    places = {index.fqn: (index, info) for index, info in content.storage_data.items()}
    content.storage_data[places["decoder.final_layernorm.weight"][0]] = places["output_layer.weight"][1]


SHARD, DISTCP = "model-00003-of-00008.safetensors", "__1_0.distcp"
OF_BOTH = {
    "wrong shape": (lambda folder: edit_config(folder, intermediate_size=64), r"config\.json implies \[(2, 128|64), 32\]"),
    "unknown architecture": (
        lambda folder: edit_config(folder, architectures=["Bloom"]),
        "architectures = Bloom: no such model",
    ),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
}
OF_SHARDS = OF_BOTH | {
    "missing shard": (lambda folder: (folder / SHARD).unlink(), f"names {SHARD}, which is not there"),
    "absent tensor in the index": (
        lambda folder: edit_index(folder, **{"model.absent": SHARD}),
        f"{SHARD}: lacks model.absent, which .*index.json places",
    ),
    "truncated shard": (lambda folder: cut_short(folder / SHARD), f"{SHARD}: is not a complete safetensors file"),
}
OF_TORCH_DIST = OF_BOTH | {
    "missing file": (lambda folder: (folder / DISTCP).unlink(), f"lacks its file {DISTCP}"),
    "absent tensor in the metadata": (
        lambda folder: edit_metadata(folder, misplace_final_norm),
        "does not hold decoder.final_layernorm.weight of shape",
    ),
    "missing tensor": (
        lambda folder: edit_metadata(folder, lambda it: it.state_dict_metadata.pop("decoder.final_layernorm.weight")),
        "model.norm.weight is not in",
    ),
    "truncated file": (lambda folder: cut_short(folder / DISTCP), f"{DISTCP}: is truncated"),
    "truncated metadata": (cut_metadata_short, "is not the metadata of a torch_dist checkpoint"),
}


@pytest.mark.parametrize("fault", OF_SHARDS)
def test_a_fault_in_a_folder_of_shards(sources, tmp_path: Path, fault: str):
    spoil, message = OF_SHARDS[fault]
    shutil.copytree(sources["sharded"], tmp_path / "source")
    spoil(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        to_megatron(tmp_path / "source", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("fault", OF_TORCH_DIST)
def test_a_fault_in_a_megatron_checkpoint(sources, tmp_path: Path, monkeypatch, fault: str):
    spoil, message = OF_TORCH_DIST[fault]
    monkeypatch.setattr(torch_dist_plan, "MAX_FILE_BYTES", 40_000)
    to_megatron(sources["untied"], tmp_path / "source")
    spoil(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        to_hf(tmp_path / "source", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def position_of(folder: Path, tensor: torch.Tensor) -> int:
    position = (folder / "__0_0.distcp").read_bytes().find(tensor.view(torch.uint8).numpy().tobytes())
    assert position > 0
    return position


def test_one_flipped_bit_is_found(sources, converted: Path, tmp_path: Path):
    name = "model.layers.1.mlp.down_proj.weight"
    flip(converted / "__0_0.distcp", position_of(converted, tensors_of(sources["untied"])[name]) + 2 * (48 * 3 + 5))
    with pytest.raises(UserError, match=rf"__0_0.distcp: is damaged: {name} does not match its hash"):
        to_hf(converted, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    with pytest.raises(UserError, match=rf"bits: {name} differs in 1 of 1536 elements, first at \[3, 5\]"):
        check(sources["untied"], converted)
    with pytest.raises(UserError, match=rf"damaged: {name} in .*__0_0.distcp \(A\) does not match its hash"):
        check(converted, converted)


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "common.pt", "tokenizer.json", "chat_template.jinja"])
def test_a_flipped_bit_outside_all_tensors_is_found(converted: Path, file: str):
    position = (converted / file).read_bytes().find(b"archive") if file.endswith("distcp") else 8
    flip(converted / file, position)
    message = r"\.metadata: differs from conversion.json" if file == ".metadata" else rf"damaged: {file} of A differs from"
    with pytest.raises(UserError, match=message):
        check(converted, converted)


def test_a_checkpoint_without_manifest_is_proven_by_the_checksums_in_its_archives(sources, tmp_path: Path):
    """As Megatron saves: here by torch's own writer. Megatron itself silently loads such a file."""
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
    with pytest.raises(
        UserError, match=rf"{file.name}: is damaged: the bytes of lm_head.weight do not match their stored checksum"
    ):
        to_hf(tmp_path / "saved", tmp_path / "again", model=sources["untied"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 140}, r"embedding.word_embeddings.weight has shape \[131, 32\], but config.json implies \[140, 32\]"),
        ({"num_hidden_layers": 3}, r"linear_qkv.weight has shape \[2, 64, 32\], but config.json implies \[3, 64, 32\]"),
        ({"intermediate_size": 64}, r"linear_fc1.weight has shape \[2, 96, 32\], but config.json implies \[2, 128, 32\]"),
        (
            {"tie_word_embeddings": True},
            "output_layer.weight differs from model.embed_tokens.weight .*set tie_word_embeddings",
        ),
        ({"architectures": ["Qwen3ForCausalLM"], "head_dim": 4}, "q_norm.weight is not in|linear_qkv.bias is a key"),
    ],
    ids=["vocabulary", "layers", "MLP", "tied", "family"],
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

    with pytest.raises(UserError, match=r"problems compared with"):
        check(sources["untied"], changed(sources["untied"], spoil))
    found = {tuple(line.split()[:2]) for line in capsys.readouterr().out.splitlines()}
    assert found == {
        ("missing:", "model.norm.weight"),
        ("unexpected:", "new"),
        ("dtype:", "lm_head.weight"),
        ("shape:", "model.layers.0.mlp.gate_proj.weight"),
        ("bits:", "model.layers.0.input_layernorm.weight"),
        ("bits:", "model.layers.1.mlp.up_proj.weight"),
        ("non-finite:", "model.layers.1.mlp.up_proj.weight"),
    }


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

    (tmp_path / "there").mkdir()
    for convert, source in ((to_megatron, sources["untied"]), (to_hf, converted)):
        with pytest.raises(UserError, match="already exists"):
            convert(source, tmp_path / "there")
    assert not list((tmp_path / "there").iterdir())
    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / "journal.jsonl").open("a") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="being written by another process"):
            to_megatron(sources["untied"], tmp_path / "out")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_not_another_process(sources, tmp_path: Path, monkeypatch, number: int):
    def no_lock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_lock)
    with pytest.raises(UserError, match=r"^DST = .*/out: cannot be locked: .*; mount its file system with locks"):
        to_megatron(sources["untied"], tmp_path / "out")


def test_what_a_conversion_links_to_stays(sources, tmp_path: Path):
    """A link in the folder of an earlier conversion is deleted, and so is one in its place; what they lead to is not."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "weights").write_text("kept")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "journal.jsonl").touch()
    (tmp_path / "out.partial" / "link").symlink_to(tmp_path / "precious")
    to_megatron(sources["untied"], tmp_path / "out")
    assert (tmp_path / "precious" / "weights").read_text() == "kept"
    assert not (tmp_path / "out" / "link").is_symlink()


def test_exit_codes_and_messages(command, sources, changed, tmp_path: Path):
    assert command("convert", "to-megatron", sources["untied"], tmp_path / "megatron").returncode == 0
    same = command("convert", "check", sources["untied"], tmp_path / "megatron")
    assert same.returncode == 0
    assert "are identical" in same.stdout
    bad = command("convert", "to-megatron", changed(sources["untied"], add_nan), tmp_path / "x", "--strict")
    assert bad.returncode == 2
    assert "is not finite at [5, 17]" in bad.stderr
    assert "Traceback" not in bad.stderr
    different = command("convert", "check", tmp_path / "changed", tmp_path / "megatron")
    assert different.returncode == 2
    assert "non-finite: model.layers.1.mlp.up_proj.weight at [5, 17]" in different.stdout


def test_a_full_disk_says_so_and_the_same_command_resumes(sources, command, small_disk):
    disk = small_disk("64k")
    full = command("convert", "to-megatron", sources["untied"], disk / "out")
    assert full.returncode == 75, full.stderr
    assert "No space left on device" in full.stderr
    assert "are needed" in full.stderr
    assert not (disk / "out").exists()
    enlarge(disk, "4M")
    assert command("convert", "to-megatron", sources["untied"], disk / "out").returncode == 0
    check(sources["untied"], disk / "out")


def test_a_disk_that_fills_up_meanwhile(sources, converted: Path, tmp_path: Path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for convert, source, file in (
        (to_megatron, sources["untied"], "__0_0.distcp"),
        (to_hf, converted, "model.safetensors"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(engine.os, "pwrite", fail)
            with pytest.raises(OSError, match="No space left") as caught:
                convert(source, tmp_path / file)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(tmp_path / f"{file}.partial" / file)
        assert not (tmp_path / file).exists()
        convert(source, tmp_path / file)
        check(sources["untied"], tmp_path / file)
