"""Every possible layout: those that fit, fastest first, and why the others do not."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from nft_megatron.base.errors import UserError
from nft_megatron.config.schema import Config
from nft_megatron.plan.estimate import TrainPlan, plan_training
from nft_megatron.plan.layouts import Cluster, ParallelLayout
from nft_megatron.plan.memory import FIT
from nft_megatron.plan.workload import Assumptions, workload_of
from nft_megatron.weights import ModelShape

MAX_VIRTUAL = 8


@dataclass(frozen=True)
class Search:
    """``fitting``: fastest first. ``refused``: reason → number of layouts. ``smallest``: the lowest peak of all, in bytes."""

    fitting: tuple[TrainPlan, ...]
    refused: dict[str, int]
    smallest: float


def search(config: Config, shape: ModelShape, cluster: Cluster, assumptions: Assumptions) -> Search:
    """Try every layout of ``config`` over the cluster's trainers, with every kind of recomputation."""
    work = workload_of(config, assumptions)
    fitting, refused, smallest = [], Counter[str](), float("inf")
    for layout in candidates(config, shape, cluster):
        try:
            plan = plan_training(config, shape, cluster, layout, work)
        except UserError as error:
            refused[f"{error.field} {error.problem}"] += 1
            continue
        smallest = min(smallest, plan.peak)
        if plan.fits:
            fitting.append(plan)
        else:
            refused[f"more than {FIT:.0%} of the memory with model.recompute = {layout.recompute}"] += 1
    fitting.sort(key=lambda plan: plan.time.total)
    return Search(tuple(fitting), dict(refused.most_common()), smallest)


def candidates(config: Config, shape: ModelShape, cluster: Cluster) -> Iterator[ParallelLayout]:
    """Tensor groups within a node; pipeline stages with equal numbers of layers, each of at most ``MAX_VIRTUAL`` parts."""
    gpus, layers = cluster.num_trainers, shape.num_layers
    powers_of_two = [2**power for power in range(gpus.bit_length())]
    for tensor, pipeline, context in itertools.product(_divisors(cluster.gpus_per_node), _divisors(layers), powers_of_two):
        data, rest = divmod(gpus, tensor * pipeline * context)
        if rest:
            continue
        parts = [part for part in _divisors(layers // pipeline) if part <= MAX_VIRTUAL] if pipeline > 1 else [1]
        experts = [1] if shape.experts is None else [size for size in powers_of_two if data * context % size == 0]
        for virtual, recompute, expert in itertools.product(parts, ("none", "selective", "full"), experts):
            yield ParallelLayout(
                tensor=tensor,
                pipeline=pipeline,
                virtual_pipeline=virtual,
                context=context,
                data=data,
                sequence_parallel=config.parallel.sequence_parallel,
                recompute=recompute,
                micro_batch_tokens=config.train.micro_batch_tokens,
                expert=expert,
            )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
