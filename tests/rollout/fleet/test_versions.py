"""The stream's check, the files of a version, and the buckets of a broadcast."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nft_megatron.base.errors import StoppedEarly, UserError
from nft_megatron.config.load import load_config
from nft_megatron.rollout.fleet.broadcast import fill_buckets, open_bucket
from nft_megatron.rollout.fleet.settings import open_fleet
from nft_megatron.rollout.fleet.versions import CheckedStream, VersionWriter, remove_versions
from nft_megatron.weights.fingerprint import weights_fingerprint
from nft_megatron.weights.hf_reader import HFReader


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(40, 7, generator=generator),
        "b": torch.randn(3, generator=generator).bfloat16(),
        "c": torch.randn(300, generator=generator).half(),
        "d": torch.randn(8, 30, generator=generator).T,
        "e": torch.arange(6).view(2, 3),
    }


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_safetensors_and_our_reader_read_the_files(tensors, tmp_path):
    stream = CheckedStream(tensors.items(), shapes(tensors))
    folder = VersionWriter(tmp_path, 12, shard_bytes=1500).write(stream)
    assert folder == tmp_path / "version_000012"
    paths = sorted(folder.glob("*.safetensors"))
    assert len(paths) == 3
    read = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    with HFReader(folder) as reader:
        assert {name: reader.shape(name) for name in reader.names} == shapes(tensors)
        assert torch.equal(reader.read("d", 0, 0, 30), tensors["d"])
    with safe_open(paths[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert stream.fingerprint == weights_fingerprint(tensors.items())
    assert stream.num_bytes == 40 * 7 * 4 + 3 * 2 + 300 * 2 + 8 * 30 * 4 + 6 * 8


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda items: items[:-1], "e: missing"),
        (lambda items: [*items, items[0]], "a: this tensor is repeated"),
        (lambda items: [("x", items[0][1]), *items[1:]], "x: this tensor is repeated or not in the model"),
        (lambda items: [("a", items[0][1].T), *items[1:]], r"a: has shape \(7, 40\), not \(40, 7\)"),
    ],
)
def test_a_stream_that_is_not_the_model_leaves_no_files(tensors, tmp_path, change, problem):
    stream = CheckedStream(change(list(tensors.items())), shapes(tensors))
    with pytest.raises(UserError, match=f"weights = {problem}"):
        VersionWriter(tmp_path, 1, shard_bytes=100).write(stream)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_files_and_is_reported(tensors, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("nft_megatron.rollout.fleet.versions.fsync_path", full)
    with pytest.raises(OSError, match="No space left"):
        VersionWriter(tmp_path, 1, shard_bytes=100).write(tensors.items())
    assert list(tmp_path.iterdir()) == []


def test_old_versions_are_removed_and_other_folders_kept(tmp_path):
    for name in ("version_000001", "version_000002", "version_000003", "version_x", "mine"):
        (tmp_path / name).mkdir()
    remove_versions(tmp_path, keep={2, 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "version_000002", "version_000003", "version_x"]


def test_a_version_that_is_a_link_costs_nothing_of_its_target(tensors, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "weights").write_text("kept")
    for version in (1, 2):
        (tmp_path / f"version_{version:06d}").symlink_to("precious")
    remove_versions(tmp_path, keep=set())
    VersionWriter(tmp_path, 2, shard_bytes=10_000).write(tensors.items())
    assert (tmp_path / "version_000002" / "model-00001.safetensors").is_file()
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["weights"]


def test_runs_that_share_a_folder_delete_nothing_of_each_other_or_of_others(model_folder, run_config, tmp_path):
    shared = tmp_path / "weights"
    (shared / "version_000001").mkdir(parents=True)
    (shared / ".tmp-1-version_000002").write_text("kept")
    options = ["rollout.engine=vllm", "fleet.wait_seconds=0.001", f"fleet.weights_dir={shared}"]
    fleets = [open_fleet(load_config(run_config(name), options)) for name in ("a", "b")]
    with HFReader(model_folder) as reader:
        weights = {name: reader.read(name, 0, 0, reader.shape(name)[0]) for name in reader.names}

    def folders(name):
        return sorted(path.parent.name.rpartition("-")[0] for path in shared.glob("*-*/version_*") if path.name == name)

    for version, fleet in ((1, fleets[0]), (1, fleets[1]), (2, fleets[1])):
        with pytest.raises(StoppedEarly):
            fleet.publish(weights.items(), version)
    assert folders("version_000001") == ["a", "b"] and folders("version_000002") == ["b"]
    fleets[1].close()
    assert folders("version_000001") == ["a"], "a run's versions outlive those of others"
    fleets[0].close()
    assert {path.name for path in shared.iterdir() if "-" not in path.name} == {"version_000001"}
    assert (shared / ".tmp-1-version_000002").exists() and not list(shared.glob("*-*/version_*"))


@pytest.mark.parametrize("max_bytes", [64, 700, 1 << 20])
def test_buckets_hold_the_stream_within_their_budget(tensors, max_bytes):
    received, sizes = {}, []
    for slots, flat in fill_buckets(tensors.items(), max_bytes, torch.device("cpu")):
        sizes.append((flat.numel(), len(slots)))
        received |= {name: tensor.clone() for name, tensor in open_bucket(slots, flat.clone())}
    assert list(received) == list(tensors)
    for name, tensor in tensors.items():
        assert received[name].dtype == tensor.dtype and torch.equal(received[name], tensor)
    assert all(size <= max_bytes or num_tensors == 1 for size, num_tensors in sizes)
    assert len(sizes) == {64: 5, 700: 4, 1 << 20: 1}[max_bytes]
