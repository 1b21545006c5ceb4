"""Where the configured engine generates, and what cannot run."""

import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.plan.layouts import cluster_of
from nft_megatron.plan.models import PUBLIC_MODELS
from nft_megatron.plan.servers import Servers, servers_of, with_tensor_parallel

SHAPE = PUBLIC_MODELS["Qwen2.5-7B"]
H100 = 79.1 * 2**30
WEIGHTS, TOKEN = 2 * 7_615_616_512, 2 * 2 * 28 * 4 * 128  # bytes of the weights, and of a token's keys and values


def of(config) -> Servers:
    return servers_of(config, SHAPE, cluster_of(config))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_rollout_nodes_servers_are_of_the_configured_size(make_config, size: int):
    servers = of(make_config(cluster={"rollout_nodes": 3}, fleet={"tensor_parallel": size}))
    assert (servers.num, servers.gpus, servers.num_gpus) == (24 // size, size, 24)
    assert servers.kv_tokens == int((size * (0.9 * H100 - 5e9) - WEIGHTS) / TOKEN)
    assert (servers.outstanding, servers.max_running) == (servers.kv_tokens, 1024)


def test_flags_of_vllm_and_outstanding_tokens_count(make_config):
    flags = ["--gpu-memory-utilization", "0.5", "--max-num-seqs=64"]
    servers = of(make_config(fleet={"arguments": flags, "outstanding_tokens": 12_345}))
    assert servers.kv_tokens == int((0.5 * H100 - 5e9 - WEIGHTS) / TOKEN)
    assert (servers.outstanding, servers.max_running) == (12_345, 64)


@pytest.mark.parametrize(
    ("fleet", "num"),
    [
        ({"urls": ["https://a", "https://b", "https://c"]}, 3),
        ({"servers": 2, "devices": ["8,9", "10,11"], "tensor_parallel": 2}, 2),
    ],
)
def test_servers_beside_the_trainers_run_on_gpus_of_their_own(make_config, fleet: dict, num: int):
    assert of(make_config(cluster={"rollout_nodes": 0}, fleet=fleet)).num == num


@pytest.mark.parametrize(
    "fleet",
    [
        {},
        {"servers": 1},  # sees the trainers' GPUs
        {"servers": 2, "devices": ["8", "3"]},  # 3 is a trainer's
        {"servers": 2, "devices": ["8"]},  # the second sees the trainers' GPUs
    ],
)
def test_a_server_on_a_trainers_gpu_is_refused(make_config, fleet: dict):
    with pytest.raises(UserError, match="the trainers fill all 8 GPUs, and a vLLM server cannot share one") as caught:
        of(make_config(cluster={"rollout_nodes": 0}, fleet=fleet))
    assert caught.value.field == "cluster.rollout_nodes"


@pytest.mark.parametrize(
    ("sections", "field", "problem"),
    [
        ({"fleet": {"tensor_parallel": 16}}, "fleet.tensor_parallel", "a server's GPUs are in one node, which has 8"),
        ({"fleet": {"tensor_parallel": 8}}, "fleet.tensor_parallel", "28 attention heads"),
        ({"fleet": {"tensor_parallel": 4, "min_servers": 3}}, "fleet.min_servers", "there are 2"),
        (
            {"fleet": {"arguments": ["--gpu-memory-utilization=0.24"]}},
            "fleet.tensor_parallel",
            "may take 4,096 tokens, and 1 h100",
        ),
        ({"fleet": {"arguments": ["--gpu-memory-utilization=much"]}}, "fleet.arguments", "is not a positive number"),
        ({"rollout": {"engine": "embedded"}}, "cluster.rollout_nodes", "would do nothing"),
    ],
)
def test_what_cannot_run_is_refused(make_config, sections: dict, field: str, problem: str):
    with pytest.raises(UserError, match=problem) as caught:
        of(make_config(**sections))
    assert caught.value.field == field


def test_the_embedded_engine_decodes_on_cpu_cores_and_never_while_training(make_config):
    rollout = {"engine": "embedded", "processes": 3, "batch_size": 5}
    servers = of(make_config(rollout=rollout, cluster={"rollout_nodes": 0}))
    assert (servers.gpu.name, servers.num, servers.max_running, servers.overlaps) == ("cpu", 3, 5, False)


def test_other_sizes_use_the_same_gpus(make_config):
    config = make_config(fleet={"tensor_parallel": 2})
    servers = of(config)
    other = with_tensor_parallel(servers, config, SHAPE, 4)
    assert other is not None
    assert (other.num, other.gpus, other.num_gpus) == (2, 4, 8)
    assert other == of(make_config(fleet={"tensor_parallel": 4}))
    assert with_tensor_parallel(servers, config, SHAPE, 8) is None  # 28 heads
