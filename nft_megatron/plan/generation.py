"""How long the servers take to generate, by roofline: an estimate for servers that batch continuously, as vLLM does.

A server holds the weights in bfloat16 and, in the remaining memory, keys and values. To generate one token for each of n
running answers, the linear layers read all weights or compute 2 FLOPs per weight and answer, whichever takes longer; then
attention reads all keys and values. The shares of the memory's bandwidth that the two reach, and the cost of an all-reduce, are
calibrated on two published RL steps and checked on others (benchmarks/plan_published.py). A simulation of one server admits
answers as others finish, so the tail of long ones is part of the time.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nft_megatron.plan.compute import active_parameters, expert_parameters
from nft_megatron.plan.hardware import ACHIEVABLE
from nft_megatron.plan.servers import Servers
from nft_megatron.plan.workload import Workload
from nft_megatron.rollout.fleet.capacity import key_value_bytes
from nft_megatron.weights import ModelShape, num_parameters

ITERATION_SECONDS = 4e-3
COLLECTIVE_SECONDS = 40e-6
"""Assumptions about the engine: the overhead of an iteration in addition to the GPU's work, and what an all-reduce of a few
tokens costs besides its bytes."""


@dataclass(frozen=True)
class Generation:
    """``num_running`` answers at once on each of ``servers``; ``tokens_per_second`` of all of them together."""

    servers: Servers
    num_running: int
    seconds: float
    tokens_per_second: float


def generation(shape: ModelShape, servers: Servers, work: Workload) -> Generation:
    """A step's answers on ``servers``."""
    gpu, size = servers.gpu, servers.gpus
    weights, key_value = 2.0 * num_parameters(shape), key_value_bytes(shape, 2, size)
    active = active_parameters(shape)
    resident = work.prompt_tokens + work.mean_answer
    room = min(servers.kv_tokens, servers.outstanding)
    running = max(1, min(servers.max_running, int(room / resident)))
    latency = ITERATION_SECONDS + (2 * shape.num_layers * COLLECTIVE_SECONDS if size > 1 else 0.0)
    bandwidth = size * gpu.memory_bandwidth
    flops = size * gpu.flops_of("bfloat16") * ACHIEVABLE.matmul

    def seconds(num: float, tokens: float) -> float:
        """Seconds to generate one token for each of ``num`` answers with ``tokens`` tokens in total."""
        linear = max(weights * read_share(shape, num) / (bandwidth * ACHIEVABLE.decoding_weights), 2 * active * num / flops)
        attention = tokens * key_value / (bandwidth * ACHIEVABLE.decoding_attention)
        sent = 2 * 2 * shape.num_layers * num * shape.hidden_size * 2 * (size - 1) / size
        return linear + attention + sent / (gpu.node_bandwidth * ACHIEVABLE.node) + latency

    lengths = np.random.default_rng(0).permutation(np.resize(work.answer_lengths, work.num_asked))[:: servers.num]
    decoding = simulate(lengths.tolist(), work.prompt_tokens, running, seconds)
    prompts = work.num_questions * work.prompt_tokens  # once per question: its answers share it
    total = decoding + 2 * active * prompts / (servers.num * flops)
    return Generation(servers, min(running, len(lengths)), total, work.num_asked * work.mean_answer / total)


def read_share(shape: ModelShape, num: float) -> float:
    """The share of the weights that ``num`` tokens read: of experts, only those that any of the tokens is sent to.

    Each token takes k of E experts, so an expert stays unread with probability (1 − k/E)^num.
    """
    if shape.experts is None:
        return 1.0
    experts = shape.experts
    in_experts = expert_parameters(shape) / num_parameters(shape)
    return 1 - in_experts * (1 - experts.experts_per_token / experts.num_experts) ** num


def simulate(lengths: Sequence[int], prompt: int, running: int, seconds: Callable[[float, float], float]) -> float:
    """Time until a server has generated all answers, at most ``running`` at once, started in the given order.

    ``seconds(num, tokens)``: time of one iteration, which generates a token for each running answer.

    >>> simulate([2, 4, 4], prompt=1, running=2, seconds=lambda num, tokens: 1.0)  # 2 and 4, then the third after the first
    6.0
    """
    waiting = list(reversed(lengths))
    ends: list[tuple[int, int]] = []  # (last iteration, first iteration)
    now, started, total = 0, 0, 0.0  # started: sum of the running answers' first iterations
    while waiting or ends:
        while waiting and len(ends) < running:
            heapq.heappush(ends, (now + waiting.pop(), now))
            started += now
        end, start = ends[0]
        middle = (now + end) / 2
        tokens = len(ends) * (prompt + middle) - started
        total += (end - now) * seconds(len(ends), tokens)
        heapq.heappop(ends)
        now, started = end, started - start
    return total
