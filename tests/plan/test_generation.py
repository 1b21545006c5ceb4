"""The simulated engine, against one that goes token by token."""

import random
from dataclasses import replace

import pytest

from nft_megatron.plan.generation import generation, read_share, simulate
from nft_megatron.plan.hardware import ACCELERATORS
from nft_megatron.plan.models import PUBLIC_MODELS
from nft_megatron.plan.servers import Servers
from nft_megatron.plan.workload import Assumptions, workload_of
from nft_megatron.rollout.fleet.capacity import kv_tokens
from nft_megatron.weights import num_parameters
from nft_megatron.weights.shape import Experts

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


def servers(num: int, gpus: int = 1, shape=SHAPE, **fields) -> Servers:
    """Servers on H100s with vLLM's defaults."""
    tokens = kv_tokens(shape, gpu_bytes=ACCELERATORS["h100"].memory, tensor_parallel=gpus, arguments=())
    return Servers(
        ACCELERATORS["h100"], num, gpus, **{"kv_tokens": tokens, "outstanding": tokens, "max_running": 1024} | fields
    )


def test_twice_the_servers_take_less_time_and_never_less_than_half(make_config):
    work = workload_of(make_config(), Assumptions())
    one, two = (generation(SHAPE, servers(num), work) for num in (8, 16))
    assert one.seconds / 2 <= two.seconds < one.seconds


@pytest.mark.parametrize("limit", ["kv_tokens", "outstanding"])
def test_a_server_runs_as_many_answers_as_its_memory_and_its_outstanding_tokens_allow(make_config, limit: str):
    work = workload_of(make_config(), Assumptions(answer_tokens=900))
    resident = 128 + work.mean_answer
    assert generation(SHAPE, servers(2, **{limit: int(20.5 * resident)}), work).num_running == 20
    assert generation(SHAPE, servers(2, max_running=7), work).num_running == 7


def test_decoding_alone_is_bound_by_reading_the_weights(make_config):
    """One answer at a time on one GPU: at best the memory's bandwidth over the bytes of the weights."""
    rollout = {"questions_per_step": 4, "group_size": 2, "max_answer_tokens": 1000}
    config = make_config(rollout=rollout, train={"updates_per_step": 4})
    work = workload_of(config, Assumptions(answer_tokens=1000, mixed_share=1.0))
    engines = generation(SHAPE, servers(8), work)
    weights = 2 * 7_615_616_512
    assert engines.num_running == 1
    limit = 8 * 3.35e12 / weights  # eight servers
    assert 0.3 * limit < engines.tokens_per_second < 0.8 * limit


def test_few_tokens_read_few_experts_and_many_read_all():
    """Against the mean over random draws of k of E experts per token."""
    experts = Experts(num_experts=16, experts_per_token=2, ffn_hidden_size=64, normalise_topk=True)
    shape = replace(SHAPE, architecture="Qwen3MoeForCausalLM", qkv_bias=False, qk_norm=True, experts=experts)
    in_experts = 3 * shape.num_layers * 16 * shape.hidden_size * 64 / num_parameters(shape)
    rng = random.Random(0)
    for num in (1, 5, 30):
        met = [len({expert for _ in range(num) for expert in rng.sample(range(16), 2)}) / 16 for _ in range(4000)]
        assert read_share(shape, num) == pytest.approx(1 - in_experts * (1 - sum(met) / len(met)), rel=0.01)
    assert read_share(SHAPE, 1) == 1
