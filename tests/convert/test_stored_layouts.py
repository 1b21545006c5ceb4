"""Checkpoints as other layouts store them, made from the weight table by torch alone: no Megatron needed to see each case."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from convert.conftest import tensors_of
from tiny_families import FAMILIES, SIZES

from nft_megatron.base.errors import UserError
from nft_megatron.convert.commands import check, to_hf
from nft_megatron.weights import read_shape, weight_table
from nft_megatron.weights.table import Entry, merge

NUM_LAYERS = 8
PADDED_VOCAB = 256


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """A Qwen2 of eight layers."""
    config_class, model_class, changes = FAMILIES["qwen2"]
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("deep")
    model_class(config_class(**{**SIZES, **changes, "num_hidden_layers": NUM_LAYERS})).bfloat16().save_pretrained(folder)
    return folder


def parameter(entry: Entry, tensors: dict, tensor_size: int = 1, rank: int = 0) -> torch.Tensor:
    return merge(entry, [tensors[name] for name in entry.sources], tensor_size, rank, PADDED_VOCAB)


@pytest.mark.parametrize(("tensor", "pipeline", "virtual"), [(1, 1, 1), (2, 2, 2), (4, 2, 1), (1, 4, 2)])
def test_a_file_a_rank_with_interleaved_stages(deep: Path, tmp_path: Path, tensor: int, pipeline: int, virtual: int):
    tensors = tensors_of(deep)
    entries = weight_table(read_shape(deep)).entries
    per_chunk = NUM_LAYERS // (pipeline * virtual)
    for rank in range(tensor):
        for stage in range(pipeline):
            content: dict = {"iteration": 3, "optimizer": {"exp_avg": torch.ones(5)}}
            for part in range(virtual):
                first = (part * pipeline + stage) * per_chunk  # stages take turns: chunk 0 of each, then chunk 1 of each
                state = {}
                for entry in entries:
                    prefix, _, rest = entry.name.partition("decoder.layers.")
                    if not prefix and rest:
                        number, _, name = rest.partition(".")
                        if first <= int(number) < first + per_chunk:
                            state[f"decoder.layers.{int(number) - first}.{name}"] = parameter(entry, tensors, tensor, rank)
                    elif first == 0 if entry.name.startswith("embedding") else first + per_chunk == NUM_LAYERS:
                        state[entry.name] = parameter(entry, tensors, tensor, rank)
                content[f"model{part}" if virtual > 1 else "model"] = state
            own = tmp_path / "iter_0000003" / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else ""))
            own.mkdir(parents=True)
            torch.save(content, own / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3\n")
    to_hf(tmp_path, tmp_path / "hf", model=deep)
    check(deep, tmp_path / "hf")
    check(deep, tmp_path)
    if tensor * pipeline > 1:
        min((tmp_path / "iter_0000003").iterdir()).rename(tmp_path / "elsewhere")
        with pytest.raises(UserError, match="of the"):
            to_hf(tmp_path, tmp_path / "again", model=deep)


def test_layers_with_their_numbers_in_the_keys(deep: Path, tmp_path: Path):
    """As Megatron stores layers that are not all alike (`non_homogeneous_layers`)."""
    tensors = tensors_of(deep)
    entries = [entry for entry in weight_table(read_shape(deep)).entries if entry.exported]
    dcp.save({entry.name: parameter(entry, tensors) for entry in entries}, checkpoint_id=tmp_path / "saved", no_dist=True)
    to_hf(tmp_path / "saved", tmp_path / "hf", model=deep)
    check(deep, tmp_path / "hf")


def test_padding_of_the_vocabulary_is_left_out_and_mentioned(deep: Path, tmp_path: Path, capsys):
    test_layers_with_their_numbers_in_the_keys(deep, tmp_path)
    assert f"output_layer.weight: rows 131 to {PADDED_VOCAB} are padding and ignored" in capsys.readouterr().out


def test_a_checkpoint_in_a_run_folder_knows_its_model(deep: Path, tmp_path: Path):
    tensors = tensors_of(deep)
    entries = [entry for entry in weight_table(read_shape(deep)).entries if entry.exported]
    state = {entry.name: parameter(entry, tensors) for entry in entries} | {"optimizer.state.exp_avg.x": torch.ones(3)}
    dcp.save(state, checkpoint_id=tmp_path / "run" / "checkpoints" / "step_000002", no_dist=True)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_000002\n")
    with pytest.raises(UserError, match=r"has no config\.json"):
        to_hf(tmp_path / "run" / "checkpoints", tmp_path / "hf")
    (tmp_path / "run" / "config.yaml").write_text(f"model:\n  path: {deep}\n")
    to_hf(tmp_path / "run" / "checkpoints", tmp_path / "hf")
    check(deep, tmp_path / "hf")


@pytest.mark.parametrize("workers", [0, -1])
def test_no_threads_are_refused(deep: Path, workers: int):
    with pytest.raises(UserError, match="--workers"):
        check(deep, deep, workers=workers)


def test_what_is_no_checkpoint(deep: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        to_hf(tmp_path / "absent", tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a checkpoint"):
        to_hf(tmp_path / "empty", tmp_path / "hf", model=deep)
