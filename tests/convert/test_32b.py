"""Qwen2.5-32B in its real shape: files without content, and the real Megatron-Core model of every rank on the meta device."""

import itertools
import json
import math
import os
import tracemalloc
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from convert_worker import wanted
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import Qwen2Config, Qwen2ForCausalLM

from nft_megatron.convert.commands import to_hf, to_megatron
from nft_megatron.convert.engine import Files
from nft_megatron.convert.locate import ModelFiles
from nft_megatron.convert.torch_dist_plan import MAX_FILE_BYTES, plan_torch_dist
from nft_megatron.convert.transfer import _write_around_tensors
from nft_megatron.weights import read_shape, weight_table

CONFIG = {
    "vocab_size": 152064,
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 1e6,
}
NUM_SHARDS, NUM_BYTES = 17, 65_527_752_704  # as model.safetensors.index.json of Qwen/Qwen2.5-32B says
TENSOR, PIPELINE = 8, 4


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor, by transformers."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Qwen2ForCausalLM(Qwen2Config(**CONFIG)).state_dict().items()}


@pytest.fixture(scope="module")
def source(shapes: dict[str, tuple[int, ...]], tmp_path_factory) -> Path:
    """A folder whose files have headers and lengths; all else of them is a hole."""
    folder = tmp_path_factory.mktemp("32B")
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config | CONFIG))
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    assert sum(sizes.values()) == NUM_BYTES
    weight_map, shards, before = {}, defaultdict(dict), 0
    for name, size in sizes.items():
        file = f"model-{before * NUM_SHARDS // NUM_BYTES + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        start = max((entry["data_offsets"][1] for entry in shards[file].values()), default=0)
        shards[file][name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, start + size]}
        weight_map[name] = file
        before += size
    for file, header in shards.items():
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        with (folder / file).open("r+b") as handle:
            handle.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
    assert len(shards) == NUM_SHARDS
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def target(source: Path, tmp_path_factory) -> Path:
    """What a conversion of it writes around the tensors, and holes in their place."""
    folder = tmp_path_factory.mktemp("32B-megatron")
    table = weight_table(read_shape(source))
    plan = plan_torch_dist(folder, table, dict.fromkeys(table.shapes, torch.bfloat16))
    for file, size in plan.files.items():
        file.touch()
        os.truncate(file, size)
    with Files("SRC") as files:
        _write_around_tensors(plan, files, ModelFiles(source, source))
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 30e6
    return folder


def mapped(output: str) -> dict[str, tuple[list[int], str]]:
    """The lines of a mapping table: name → shape and place."""
    lines = [line.split("  ") for line in output.splitlines()[:-1]]
    assert len({name for name, *_ in lines}) == len(lines)
    return {name: (json.loads(shape.removesuffix(" bfloat16")), place) for name, shape, place in lines}


def test_a_dry_run_maps_every_tensor_once_in_both_directions(shapes, source: Path, target: Path, tmp_path: Path, capsys):
    to_megatron(source, tmp_path / "megatron", dry_run=True)
    there = mapped(capsys.readouterr().out)
    to_hf(target, tmp_path / "hf", dry_run=True)
    assert mapped(capsys.readouterr().out) == there
    assert {name: tuple(shape) for name, (shape, _) in there.items()} == shapes
    assert len({place for _, place in there.values()}) == len(shapes)
    key = "decoder.layers.self_attention.linear_qkv.weight"
    assert there["model.layers.63.self_attn.v_proj.weight"] == ([1024, 5120], f"{key}[63], qkv part 3 of 3")
    assert not list(tmp_path.iterdir())


def test_the_plan_is_small_and_leaves_no_gap(source: Path, tmp_path: Path):
    """Memory grows with the number of tensors, not with their bytes."""
    table = weight_table(read_shape(source))
    tracemalloc.start()
    target = plan_torch_dist(tmp_path, table, dict.fromkeys(table.shapes, torch.bfloat16))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6
    assert sum(tensor.num_bytes for tensor in target.tensors.values()) == NUM_BYTES
    assert 0 < target.num_bytes - NUM_BYTES < 10e6
    assert max(target.files.values()) <= MAX_FILE_BYTES
    blocks = [block for tensor in target.tensors.values() for block in tensor.blocks]
    pieces = [(block.file, block.offset, block.num_rows * block.width) for block in blocks]
    pieces += [(file, offset, len(data)) for file, offset, data in target.parts]
    for (file, offset, length), (next_file, next_offset, _) in itertools.pairwise(sorted(pieces)):
        assert next_offset == (offset + length if next_file == file else 0)


def test_every_parameter_of_every_rank_is_stored_once(world, source: Path, target: Path):
    ranks = world(1)(wanted, source, TENSOR, PIPELINE)
    assert len(ranks) == TENSOR * PIPELINE

    metadata = FileSystemReader(target).read_metadata()
    keys = {key: value for key, value in metadata.state_dict_metadata.items() if isinstance(value, TensorStorageMetadata)}
    chunks = defaultdict(list)  # by key and first index: the layer, where there are layers
    for key, value in keys.items():
        for chunk in value.chunks:
            ranges = [range(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            for first in ranges[0] if len(value.size) > 2 else [0]:
                chunks[key, first].append(ranges)
        assert sum(math.prod(chunk.sizes) for chunk in value.chunks) == math.prod(value.size)

    held, boxes = Counter(), set()
    for rank in ranks:
        assert set(rank["objects"]) <= metadata.state_dict_metadata.keys()
        for key, whole, offset, size, is_copy in rank["tensors"]:
            stored = keys[key].size
            assert list(whole[1:]) == list(stored[1:])
            assert whole[0] == stored[0] or (stored[0], whole[0] % 1024) == (152064, 0)  # the vocabulary, unpadded and padded
            box = [range(start, min(start + length, end)) for start, length, end in zip(offset, size, stored, strict=True)]
            volume = math.prod(map(len, box))
            found = chunks[key, offset[0] if len(stored) > 2 else 0]
            assert volume == sum(math.prod(map(shared, box, ranges)) for ranges in found), (key, offset)
            if not is_copy:
                assert (key, *offset) not in boxes
                boxes.add((key, *offset))
                held[key] += volume
    assert held == {key: math.prod(value.size) for key, value in keys.items()}
    assert 2 * held.total() == NUM_BYTES


def shared(one: range, other: range) -> int:
    return max(0, min(one.stop, other.stop) - max(one.start, other.start))
