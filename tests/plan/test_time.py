"""Bytes on the wire against those that the real model sends; seconds against sums done by hand."""

from dataclasses import replace

import plan_worker
import pytest

from nft_megatron.plan.compute import stage_work
from nft_megatron.plan.hardware import ACCELERATORS, ACHIEVABLE
from nft_megatron.plan.layouts import Cluster
from nft_megatron.plan.memory import stage_numel
from nft_megatron.plan.models import PUBLIC_MODELS
from nft_megatron.plan.switches import Switches
from nft_megatron.plan.time import optimizer_seconds, traffic, train_time
from nft_megatron.plan.workload import Packs

NUM_TOKENS = sum(plan_worker.LENGTHS)
PACKS = Packs(1, NUM_TOKENS, 0, NUM_TOKENS)


def sent(collectives: list[dict], direction: str, ranks: int) -> float:
    """Bytes that a rank receives in the two layers by which the second model is longer."""
    times = {"_allgather_base_": 1, "_reduce_scatter_base_": 1, "allreduce_": 2}
    shorter, longer = ({kind: part[direction].get(kind, 0) for kind in times} for part in collectives)
    return sum(times[kind] * (longer[kind] - shorter[kind]) for kind in times) * (ranks - 1) / ranks


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_tensor_parallel_bytes(counted, make_layout, sequence_parallel: bool, recompute: str):
    seen = counted(2, 1, sequence_parallel)[f"bfloat16 {recompute}"]["collectives"]
    layout = make_layout(tensor=2, sequence_parallel=sequence_parallel, recompute=recompute)
    moved = traffic(plan_worker.small_shape(2), layout, 0, PACKS, "bfloat16")
    assert moved.tensor[0] == sent(seen, "forward", 2)
    overlapped = (
        2 * 4 * NUM_TOKENS * 64 * 2 / 2
    )  # two layers, four collectives (or two all-reduces) overlapping matrix products
    assert moved.tensor[1] == sent(seen, "backward", 2) - overlapped


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_context_parallel_bytes(counted, make_layout, recompute: str):
    seen = counted(1, 2)[f"bfloat16 {recompute}"]["collectives"]
    moved = traffic(plan_worker.small_shape(2), make_layout(context=2, recompute=recompute), 0, PACKS, "bfloat16")
    assert moved.context == (sent(seen, "forward", 2), sent(seen, "backward", 2))
    assert moved.tensor == (0, 0)


def test_a_group_within_a_node_is_fast_and_one_that_leaves_it_shares_network_cards():
    cluster = Cluster(ACCELERATORS["h100"], 8, 64, 0)
    assert cluster.bandwidth(8, 1) == cluster.bandwidth(2, 4) == 450e9
    assert cluster.bandwidth(8, 8) == 50e9  # one member in a node
    assert cluster.bandwidth(8, 4) == 100e9  # two members, two cards
    assert cluster.bandwidth(64, 1) == 400e9


SHAPE = PUBLIC_MODELS["Qwen2.5-7B"]
CLUSTER = Cluster(ACCELERATORS["h100"], 8, 8, 0)


def seconds(layout, packs: Packs, **settings):
    return train_time(SHAPE, layout, CLUSTER, packs, **{"num_updates": 1, "dtype": "bfloat16", "cpu_offload": 0.0, **settings})


def test_one_gpu_computes_at_the_assumed_share_of_its_peak(make_layout):
    packs = Packs(4, 16384, 10**7, 10000)
    time = seconds(make_layout(), packs)
    work = stage_work(SHAPE, make_layout(), 0, packs, "bfloat16").forward
    compute = work.matmul / (989.4e12 * ACHIEVABLE.matmul) + work.attention / (989.4e12 * ACHIEVABLE.attention)
    assert time.forward == pytest.approx(compute + work.bytes / (3.35e12 * ACHIEVABLE.memory))
    communication = [
        time.tensor_communication,
        time.context_communication,
        time.pipeline_communication,
        time.data_communication,
    ]
    assert [*communication, time.pipeline_bubble] == [0] * 5


def test_updates_follow_each_other(make_layout):
    packs = Packs(4, 16384, 10**7, 10000)
    layout = make_layout(tensor=2, pipeline=2, data=2)
    one, three = seconds(layout, packs), seconds(layout, packs, num_updates=3)
    assert three.total - three.old_logprobs == pytest.approx(3 * (one.total - one.old_logprobs))
    assert three.old_logprobs < 3 * one.old_logprobs  # one pipeline fill for all of them


def test_interleaving_makes_the_bubble_smaller_by_the_number_of_parts(make_layout):
    packs = Packs(4, 16384, 10**7, 10000)
    plain, interleaved = (seconds(make_layout(pipeline=2, virtual_pipeline=v, data=1), packs) for v in (1, 7))
    busy = plain.forward + plain.backward
    assert plain.pipeline_bubble == pytest.approx((busy + plain.pipeline_communication) / 4)
    assert interleaved.pipeline_bubble == pytest.approx(busy / 28)


def test_gradients_are_waited_for_only_where_the_last_backward_pass_is_too_short(make_layout):
    layout = make_layout(data=8)
    numel = stage_numel(SHAPE, layout, 0, on_gpu=True)
    gathering = 2 * numel * 7 / 8 / (450e9 * ACHIEVABLE.node)
    summing = 2 * gathering
    long = seconds(layout, Packs(1, 10**6, 10**7, 10**5))
    assert long.data_communication == pytest.approx(gathering)
    short = seconds(layout, Packs(1, 1, 1, 1))
    assert short.data_communication == pytest.approx(gathering + summing - short.backward)


def test_the_optimizer_moves_its_state_and_an_offloaded_share_of_it():
    cluster = replace(CLUSTER, gpu=replace(CLUSTER.gpu, memory_bandwidth=1e9, host_bandwidth=1e8))
    numel, own = 8_000_000, 1_000_000
    # zero and norm of all gradients; of its own millionth eighth: the gradient, three states in and out, the weight
    moved = 4 * (2 * numel + 1e6) + 1e6 * (24 + 2)
    assert optimizer_seconds(numel, own, cluster, "bfloat16", 0.0) == pytest.approx(moved / (1e9 * ACHIEVABLE.memory))
    half = optimizer_seconds(numel, own, cluster, "bfloat16", 0.5) - optimizer_seconds(numel, own, cluster, "bfloat16", 0.0)
    assert half == pytest.approx(0.5 * 24e6 / (1e8 * ACHIEVABLE.host))


def test_gradients_are_added_in_a_pass_of_their_own_only_without_the_fused_kernel(make_layout):
    layout, packs = make_layout(data=8), Packs(4, 16384, 10**7, 10000)
    fused, apart = seconds(layout, packs), seconds(layout, packs, switches=Switches(fused_gradients=False), num_updates=3)
    numel = stage_numel(SHAPE, layout, 0, on_gpu=True)
    # each of 3 × 4 times: write and read a bfloat16 gradient, read and write its float32 sum
    assert apart.gradient_adds == pytest.approx(3 * 4 * numel * (2 + 2 + 4 + 4) / (3.35e12 * ACHIEVABLE.memory))
    assert fused.gradient_adds == 0 and fused.total == pytest.approx(seconds(layout, packs).total)
