"""The simulated engine, against one that goes token by token."""

import random

import pytest

from nft_megatron.plan.generation import generation, simulate
from nft_megatron.plan.hardware import ACCELERATORS
from nft_megatron.plan.layouts import Cluster
from nft_megatron.plan.models import PUBLIC_MODELS
from nft_megatron.plan.workload import Assumptions, workload_of

SHAPE = PUBLIC_MODELS["Qwen2.5-7B"]


def token_by_token(lengths: list[int], prompt: int, running: int, seconds) -> float:
    waiting, alive, total = list(lengths), [], 0.0
    while waiting or alive:
        while waiting and len(alive) < running:
            alive.append([0, waiting.pop(0)])
        total += seconds(len(alive), sum(prompt + made + 0.5 for made, _ in alive))
        alive = [[made + 1, length] for made, length in alive if made + 1 < length]
    return total


@pytest.mark.parametrize(("count", "running"), [(1, 4), (7, 3), (40, 8), (5, 5)])
def test_an_engine_takes_as_long_as_one_that_makes_every_token(count: int, running: int):
    rng = random.Random(count)
    lengths = [rng.randint(1, 60) for _ in range(count)]

    def seconds(num: float, tokens: float) -> float:
        return 1.0 + 0.1 * num + 0.001 * tokens

    assert simulate(lengths, 10, running, seconds) == pytest.approx(token_by_token(lengths, 10, running, seconds))


def test_twice_the_gpus_take_less_time_and_never_less_than_half(make_config):
    work = workload_of(make_config(), Assumptions())
    one, two = (generation(SHAPE, Cluster(ACCELERATORS["h100"], 8, 8, gpus), work, 72e9) for gpus in (8, 16))
    assert one is not None
    assert two is not None
    assert one.seconds / 2 <= two.seconds < one.seconds


def test_an_engine_is_as_large_as_the_weights_need(make_config):
    work = workload_of(make_config(model={"path": "Qwen2.5-72B"}), Assumptions())
    shape = PUBLIC_MODELS["Qwen2.5-72B"]  # 145 GB of weights
    assert generation(shape, Cluster(ACCELERATORS["h100"], 1, 1, 8), work, 72e9) is None
    engines = generation(shape, Cluster(ACCELERATORS["h100"], 8, 8, 16), work, 72e9)
    assert engines is not None
    assert engines.engine_gpus >= 4
    assert engines.engine_gpus * engines.num_engines == 16


def test_decoding_alone_is_bound_by_reading_the_weights(make_config):
    """One answer at a time on one GPU: at best the memory's bandwidth over the bytes of the weights."""
    rollout = {"questions_per_step": 4, "group_size": 2, "max_answer_tokens": 1000}
    config = make_config(rollout=rollout, train={"updates_per_step": 4})
    work = workload_of(config, Assumptions(answer_tokens=1000, mixed_share=1.0))
    engines = generation(SHAPE, Cluster(ACCELERATORS["h100"], 1, 1, 8), work, 72e9)
    assert engines is not None
    weights = 2 * 7_615_616_512
    assert engines.num_running == 1
    limit = 8 * 3.35e12 / weights  # eight engines
    assert 0.3 * limit < engines.tokens_per_second < 0.8 * limit
