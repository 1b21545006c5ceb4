"""Clusters, layouts, and what cannot be."""

import json
from pathlib import Path

import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.plan.hardware import ACCELERATORS, accelerator
from nft_megatron.plan.layouts import check_layout, cluster_of, layout_of
from nft_megatron.plan.models import PUBLIC_MODELS, find_shape


@pytest.mark.parametrize(
    ("gpus", "trainers", "rollout"),
    [(None, 16, 48), (64, 16, 48), (128, 32, 96), (16, 8, 8), (8 * 5, 8, 32)],
)
def test_gpus_are_split_as_in_the_config(make_config, gpus: int | None, trainers: int, rollout: int):
    cluster = cluster_of(make_config(cluster={"trainer_nodes": 2, "rollout_nodes": 6}), gpus)
    assert (cluster.num_trainers, cluster.num_rollout) == (trainers, rollout)


def test_without_rollout_nodes_a_part_of_a_node_will_do(make_config):
    cluster = cluster_of(make_config(cluster={"rollout_nodes": 0}), 4, "h200")
    assert (cluster.gpu, cluster.num_trainers, cluster.num_rollout) == (ACCELERATORS["h200"], 4, 0)


@pytest.mark.parametrize(("gpus", "problem"), [(12, "whole nodes of 8"), (0, "whole nodes of 8"), (8, "single node")])
def test_gpus_that_make_no_nodes_are_refused(make_config, gpus: int, problem: str):
    with pytest.raises(UserError, match=problem) as caught:
        cluster_of(make_config(), gpus)
    assert caught.value.field == "--gpus"


def test_unknown_gpus_are_refused_with_those_that_are_known(make_config):
    with pytest.raises(UserError, match=r"cluster.gpu = v100: .*h100"):
        cluster_of(make_config(cluster={"gpu": "v100"}))
    with pytest.raises(UserError, match="--gpu = v100"):
        cluster_of(make_config(), kind="v100")


@pytest.mark.parametrize("name", ACCELERATORS)
def test_figures_of_a_gpu_are_plausible_and_have_a_source(name: str):
    gpu = accelerator(name.upper())
    assert gpu.network_bandwidth <= gpu.node_bandwidth <= gpu.memory_bandwidth
    assert gpu.flops >= gpu.flops_float32
    assert "https://www.nvidia.com/" in gpu.source or not gpu.is_gpu


def test_data_parallel_ranks_are_what_is_left(make_config):
    config = make_config(parallel={"tensor": 2, "pipeline": 2, "context": 2}, cluster={"trainer_nodes": 3})
    layout = layout_of(config, cluster_of(config))
    assert (layout.data, layout.replicas, layout.num_gpus) == (3, 6, 24)
    assert layout.local_tokens == 4096
    with pytest.raises(UserError, match="does not divide the 24 training GPUs"):
        layout_of(make_config(parallel={"tensor": 2, "pipeline": 7}), cluster_of(config))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"tensor": 3}, "28 attention heads"),
        ({"tensor": 7}, "4 key-value heads"),
        ({"pipeline": 3}, "28 layers"),
        ({"pipeline": 2, "virtual_pipeline": 4}, "28 layers"),
    ],
)
def test_models_that_cannot_be_cut_that_way(make_layout, fields: dict, problem: str):
    with pytest.raises(UserError, match=problem):
        check_layout(PUBLIC_MODELS["Qwen2.5-7B"], make_layout(**fields))


def test_sizes_come_from_a_folder_without_weights_or_from_a_public_name(tmp_path: Path):
    folder = tmp_path / "Qwen2.5-7B"
    shape, source = find_shape(folder)
    assert (shape.num_layers, "not downloaded yet" in source) == (28, True)
    folder.mkdir()
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shape, source = find_shape(folder)
    assert (shape.num_layers, "config.json" in source) == (3, True)
    with pytest.raises(UserError, match=r"model.path = .*no such folder; .*config.json.*Qwen2.5-32B"):
        find_shape(tmp_path / "unheard-of")
