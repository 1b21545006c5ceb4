"""How long the rollout GPUs take to generate, by roofline: an estimate for a server that batches continuously, as vLLM does.

An engine is a few GPUs of one node that hold the weights in bfloat16 and, in the remaining memory, keys and values. Generating
one token for each of n running answers reads all weights and all their keys and values, and takes 2 FLOPs per weight and
answer; the slower of the two sets the pace. A simulation of one engine admits answers as others finish, so the tail of long
ones is part of the time.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nft_megatron.plan.compute import num_parameters
from nft_megatron.plan.hardware import ACHIEVABLE
from nft_megatron.plan.layouts import Cluster
from nft_megatron.plan.workload import Workload
from nft_megatron.weights import ModelShape

MEMORY_SHARE = 0.9
MAX_RUNNING = 512
ITERATION_SECONDS = 4e-3
COLLECTIVE_SECONDS = 10e-6
"""Assumptions about the engine: its share of a GPU's memory, answers that run at once, the overhead of an iteration in addition
to the GPU's work, and the shortest all-reduce of a few tokens."""


@dataclass(frozen=True)
class Generation:
    """``engine_gpus`` GPUs per engine, ``num_running`` answers at once on each; ``tokens_per_second`` of all engines."""

    engine_gpus: int
    num_engines: int
    num_running: int
    seconds: float
    tokens_per_second: float


def generation(shape: ModelShape, cluster: Cluster, work: Workload, free_bytes: float) -> Generation | None:
    """The fastest way to spread engines over the generating GPUs; None if the weights fit into none.

    Args:
        free_bytes: bytes of a GPU's memory that engines may use.
    """
    sizes = [size for size in (1, 2, 4, 8, 16) if cluster.gpus_per_node % size == 0 and shape.num_attention_heads % size == 0]
    plans = (_with_engines(size, shape, cluster, work, free_bytes) for size in sizes)
    return min((plan for plan in plans if plan), key=lambda plan: plan.seconds, default=None)


def _with_engines(size: int, shape: ModelShape, cluster: Cluster, work: Workload, free_bytes: float) -> Generation | None:
    gpu, weights = cluster.gpu, 2.0 * num_parameters(shape)
    key_value = 2 * 2 * shape.num_layers * shape.num_query_groups * shape.head_dim
    room = (size * free_bytes - weights) / key_value
    resident = work.prompt_tokens + work.mean_answer
    if room < work.longest_sequence:
        return None
    num_engines = cluster.num_generating // size
    running = min(MAX_RUNNING, int(room / resident))
    latency = ITERATION_SECONDS + (2 * shape.num_layers * COLLECTIVE_SECONDS if size > 1 else 0.0)

    def seconds(num: float, tokens: float) -> float:
        """Seconds to generate one token for each of ``num`` answers with ``tokens`` tokens in total."""
        reading = (weights + tokens * key_value) / (size * gpu.memory_bandwidth * ACHIEVABLE.memory)
        computing = 2 * num_parameters(shape) * num / (size * gpu.flops_of("bfloat16") * ACHIEVABLE.matmul)
        sent = 2 * 2 * shape.num_layers * num * shape.hidden_size * 2 * (size - 1) / size
        return max(reading, computing) + sent / (gpu.node_bandwidth * ACHIEVABLE.node) + latency

    lengths = np.random.default_rng(0).permutation(np.resize(work.answer_lengths, work.num_asked))[::num_engines]
    decoding = simulate(lengths.tolist(), work.prompt_tokens, running, seconds)
    prompts = work.num_questions * work.prompt_tokens  # once per question: its answers share it
    prefill = 2 * num_parameters(shape) * prompts / (cluster.num_generating * gpu.flops_of("bfloat16") * ACHIEVABLE.matmul)
    total = decoding + prefill
    return Generation(size, num_engines, min(running, len(lengths)), total, work.num_asked * work.mean_answer / total)


def simulate(lengths: Sequence[int], prompt: int, running: int, seconds: Callable[[float, float], float]) -> float:
    """Time until an engine has generated all answers, at most ``running`` at once, started in the given order.

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
