"""Layouts that cannot be, folders that do not fit, and Megatron without a GPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nft_megatron.base.errors import UserError
from nft_megatron.model.build import build_model
from nft_megatron.model.settings import padded_vocab
from nft_megatron.model.topology import init_topology
from nft_megatron.weights.shape import SHAPE_EXAMPLE, Experts
from nft_megatron.weights.stages import Stages


@pytest.mark.parametrize(
    ("sizes", "field"),
    [
        ((3, 1, 1), "parallel.tensor"),
        ((1, 3, 1), "parallel.pipeline"),
        ((1, 1, 3), "parallel.context"),
        ((0, 1, 1), "parallel.tensor"),
        ((2, 4, 1), "parallel.tensor, parallel.pipeline, parallel.context"),
        ((2, 1, 4), "parallel.tensor, parallel.pipeline, parallel.context"),
    ],
)
def test_processes_that_do_not_divide(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int], field: str):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError) as caught:
        init_topology(*sizes)
    assert caught.value.field == field


def test_experts_are_spread_over_data_and_context_ranks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="the 2 data × context ranks") as caught:
        init_topology(2, expert=4)
    assert caught.value.field == "parallel.expert"


@pytest.mark.parametrize(
    ("sizes", "field", "problem"),
    [
        ((3, 1, 1), "parallel.tensor", "28 attention heads"),
        ((7, 1, 1), "parallel.tensor", "4 key-value heads"),
        ((1, 3, 1), "parallel.pipeline", "28 layers"),
        ((1, 4, 2), "parallel.pipeline × parallel.virtual_pipeline", "28 layers"),
    ],
)
def test_models_that_cannot_be_cut_that_way(sizes: tuple[int, int, int], field: str, problem: str):
    tensor, pipeline, virtual_pipeline = sizes
    place = SimpleNamespace(tensor_size=tensor, stages=Stages(pipeline, virtual_pipeline), expert_size=1)
    with pytest.raises(UserError, match=problem) as caught:
        build_model(SHAPE_EXAMPLE, place)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("experts", "tensor", "expert", "field", "problem"),
    [
        (Experts(8, 2, 64, True), 1, 3, "parallel.expert", "the 8 experts"),
        (None, 1, 2, "parallel.expert", "no experts"),
        (Experts(8, 2, 63, True), 2, 1, "parallel.tensor", "63 MLP units"),
        (Experts(8, 2, 64, True), 2, 1, "parallel.sequence_parallel", "require it"),
    ],
)
def test_experts_that_cannot_be_cut_that_way(experts: Experts | None, tensor: int, expert: int, field: str, problem: str):
    place = SimpleNamespace(tensor_size=tensor, stages=Stages(1), expert_size=expert)
    with pytest.raises(UserError, match=problem) as caught:
        build_model(replace(SHAPE_EXAMPLE, experts=experts), place, sequence_parallel=False)
    assert caught.value.field == field


def test_vocabulary_rows_are_even_between_ranks_and_aligned_on_cuda():
    shape = replace(SHAPE_EXAMPLE, vocab_size=131)
    places = [(SimpleNamespace(tensor_size=size, device=torch.device(kind))) for kind in ("cpu", "cuda") for size in (1, 2)]
    assert [padded_vocab(shape, place) for place in places] == [131, 132, 256, 256]


@pytest.fixture(scope="module")
def measured(model_folder: Path) -> dict:
    result = subprocess.run(
        [sys.executable, __file__, str(model_folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=150,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1]) | {"stderr": result.stderr}


def test_only_megatron_takes_the_cpu_for_its_gpu(measured: dict):
    assert measured["megatron_zeros"] == "cpu"
    assert measured["torch_untouched"]
    assert measured["meta_device"] == "meta"


def test_a_process_without_an_environment_is_a_grid_of_one(measured: dict):
    assert measured["place"] == [0, 1, True, True, True]


def test_nothing_is_printed_about_missing_fast_paths(measured: dict):
    assert measured["stderr"] == ""


def test_a_model_of_another_size_is_refused_by_tensor(measured: dict):
    assert "has shape" in measured["wrong_shape"]
    assert "model.path" in measured["wrong_shape"]


# ------------------------------------------------------------------------------------------------------------ the worker


def worker(folder: Path) -> None:
    import gc

    from nft_megatron.model.topology import shutdown

    zeros = torch.zeros
    topology = init_topology(threads=1)
    from megatron.core.pipeline_parallel import schedules

    from nft_megatron.model.cpu import adapt_to_cpu
    from nft_megatron.model.load import load_weights
    from nft_megatron.weights import read_shape

    adapt_to_cpu()  # again: no effect
    with torch.device("meta"):
        meta_device = torch.zeros(1).device.type
    shape = replace(read_shape(folder), ffn_hidden_size=64)
    chunks = build_model(shape, topology)
    try:
        load_weights(chunks, topology, shape, folder)
    except UserError as error:
        wrong_shape = str(error)
    results = {
        "megatron_zeros": schedules.torch.zeros(1, device="cuda").device.type,
        "torch_untouched": torch.zeros is zeros and not torch.cuda.is_available(),
        "meta_device": meta_device,
        "place": [topology.rank, topology.world_size, topology.is_main, topology.is_first_stage, topology.is_last_stage],
        "wrong_shape": wrong_shape,
    }
    print(json.dumps(results))
    del topology, chunks
    gc.collect()
    shutdown()


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
