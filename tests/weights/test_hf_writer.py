"""Folders written here are read by transformers."""

import errno
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from nft_megatron.weights.hf_writer import write_hf_folder


@pytest.mark.parametrize(("max_shard_bytes", "num_shards"), [(1 << 30, 1), (20_000, 4)])
def test_transformers_reads_back_every_tensor(model_folder, tmp_path, max_shard_bytes, num_shards):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    write_hf_folder(tmp_path, tensors.items(), model_folder, max_shard_bytes)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) == num_shards
    assert all((tmp_path / shard).stat().st_size < max_shard_bytes + 4096 for shard in shards)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor), name
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (model_folder / name).read_bytes()


def test_config_states_the_dtype_of_the_weights(model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    write_hf_folder(tmp_path, tensors.items(), model_folder)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert (
        json.loads((tmp_path / "config.json").read_text()).keys()
        == json.loads((model_folder / "config.json").read_text()).keys()
    )


def test_index_names_every_tensor_once_and_its_size(model_folder, tmp_path):
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(7)}
    write_hf_folder(tmp_path, tensors.items(), model_folder, max_shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 40
    assert index["weight_map"].keys() == tensors.keys()
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / shard, framework="pt") as file:
            assert torch.equal(file.get_tensor(name), tensors[name])


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from nft_megatron.weights.hf_writer import write_hf_folder
source, folder, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails like one on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    write_hf_folder(folder, [(f"t{i}", torch.zeros(1000)) for i in range(4)], source, max_shard_bytes=5000)
except OSError as error:
    print(error.errno, error.strerror, error.filename, sep="|")
"""


@pytest.mark.parametrize("part", ["copied files", "tensors"])
def test_a_full_disk_is_an_os_error_that_names_the_folder(model_folder, tmp_path, part):
    source = model_folder if part == "copied files" else tmp_path / "nothing to copy"
    command = [sys.executable, "-c", FULL_DISK, str(source), str(tmp_path), "100"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    expected = f"{errno.EFBIG}|File too large while writing an export|{tmp_path}"
    assert result.stdout.strip() == expected, result.stderr
