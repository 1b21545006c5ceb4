"""How full and how even the packs of a rollout step are, beside simpler ways and beside what is possible at all.

--answers answers of log-normal, that is long-tailed, lengths are laid out in three ways for each parallel layout:

  packed         `plan_micro_batches` and `pack`: balanced over data-parallel ranks by cost, best fit, largest first
  first fit      answers dealt out to the ranks in the order of arrival, each rank's into the first pack with room
  one a row      the same dealing, every answer a row of its own, all rows padded to the longest; rows up to the budget a batch

once as a single mini-batch, once as --updates of them, where the number of packs on a rank must be whole every time. Columns:

  packs          on a rank, over all mini-batches; the limit is what all tokens together would fill
  real, fixed    share of real tokens where every pack is padded to the budget (train.pad_to_budget)
  real           the same where a pack ends at the next multiple that the layout needs
  heaviest       cost of the rank with most of it / mean over ranks, real tokens alone; ranks wait for each other every update
  step / ideal   cost of the rank with most of it, padding and all (as in `real`), / real cost spread evenly
  plan s, pack s seconds of CPU time, medians of --repeats: the plan, which every rank computes for all, and the packs and
                 context-parallel parts of the rank with most to do

Cost is length · (1 + length / (12 · hidden)), proportional to the FLOPs of a dense transformer layer.

Then the order of micro-batches under 1F1B: the time of a simulated pipeline whose backward passes take twice as long as the
forward passes, / the time it takes if all micro-batches cost the same, mean over ranks and mini-batches. Plans are largest
first; largest in the middle, which fills and drains the pipeline with small ones, shows what another order could still gain.

Goals: real, fixed >= 0.98 for the single mini-batch, heaviest <= 1.03, plan + pack < 2 s.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # read when torch is imported

import numpy as np
import torch

from nft_megatron.base.records import AnswerTokens
from nft_megatron.batching.context import context_shard
from nft_megatron.batching.packing import pack, plan_micro_batches, sequence_cost

LAYOUTS = [(1, 1), (2, 8), (4, 8)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--answers", type=int, default=8192, help="answers of a rollout step (%(default)s)")
    add("--median", type=int, default=2900, help="of their lengths with the prompt, in tokens (%(default)s)")
    add("--sigma", type=float, default=0.9, help="standard deviation of the logarithm of the length (%(default)s)")
    add("--longest", type=int, default=14336, help="lengths are cut there (%(default)s)")
    add("--budget", type=int, default=16384, help="tokens of a micro-batch (%(default)s)")
    add("--ranks", type=int, default=16, help="data-parallel ranks (%(default)s)")
    add("--updates", type=int, default=16, help="mini-batches of the second table (%(default)s)")
    add("--hidden", type=int, default=5120, help="hidden size, for the cost of attention (%(default)s: Qwen2.5-32B)")
    add("--stages", type=int, nargs="+", default=[4, 8], help="pipeline stages for the order of micro-batches (%(default)s)")
    add("--repeats", type=int, default=5, help="of what is timed; ways take turns (%(default)s)")
    add("--seed", type=int, default=0, help="of the lengths (%(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    rng = np.random.default_rng(arguments.seed)
    lengths = rng.lognormal(np.log(arguments.median), arguments.sigma, arguments.answers)
    lengths = np.clip(lengths, 50, arguments.longest).astype(np.int64)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, numpy {np.__version__}"
    print(f"# python benchmarks/packing.py · {machine}")
    print(
        f"{arguments.answers:,} answers of {lengths.min():,} to {lengths.max():,} tokens, mean {lengths.mean():,.0f}, "
        f"{np.mean(lengths == arguments.longest):.1%} cut · budget {arguments.budget:,} · {arguments.ranks} data-parallel ranks"
    )
    for updates in (1, arguments.updates):
        print(f"\n{updates} mini-batch{'es' if updates > 1 else ''} of {arguments.answers // updates:,} answers")
        print("| layout     | way       | packs | real, fixed |  real | heaviest | step / ideal | plan s | pack s |")
        print("|------------|-----------|------:|------------:|------:|---------:|-------------:|-------:|-------:|")
        fixed, heaviest, seconds = zip(
            *(
                print_layout(
                    f"cp {context}, tp {tensor}", cases(lengths, updates, context, tensor, arguments), arguments.repeats
                )
                for context, tensor in LAYOUTS
            ),
            strict=True,
        )
        print(
            f"worst of packed: real, fixed {min(fixed):.4f} (>= 0.98 in one mini-batch), "
            f"heaviest {max(heaviest):.4f} (<= 1.03), plan + pack {max(seconds):.2f} s (< 2)"
        )
    print(f"\norder of micro-batches under 1F1B, {arguments.updates} mini-batches, time / time with equal micro-batches")
    print("| stages | largest first | smallest first | as they come | largest in the middle |")
    print("|-------:|--------------:|---------------:|-------------:|----------------------:|")
    for num_stages in arguments.stages:
        ratios = np.mean(list(orders(cases(lengths, arguments.updates, 1, 1, arguments), num_stages)), axis=0)
        print("| {:6} | {:13.3f} | {:14.3f} | {:12.3f} | {:21.3f} |".format(num_stages, *ratios), flush=True)


@dataclass(frozen=True, eq=False)
class Case:
    """One mini-batch under one layout. ``lengths`` are of its answers with their prompts."""

    lengths: np.ndarray
    budget: int
    num_ranks: int
    context: int
    sequence_multiple: int
    multiple: int
    hidden: int

    @property
    def padded(self) -> np.ndarray:
        return round_up(self.lengths, self.sequence_multiple)

    def cost(self, lengths: np.ndarray) -> float:
        return float(sequence_cost(lengths, self.hidden).sum())


def cases(lengths: np.ndarray, updates: int, context: int, tensor: int, arguments: argparse.Namespace) -> list[Case]:
    sequence_multiple = 2 * context if context > 1 else 1
    multiple = sequence_multiple * tensor
    return [
        Case(part, arguments.budget, arguments.ranks, context, sequence_multiple, multiple, arguments.hidden)
        for part in np.array_split(lengths, updates)
    ]


def round_up(counts: np.ndarray, multiple: int) -> np.ndarray:
    return -(-counts // multiple) * multiple


# ------------------------------------------------------------------------------------------------------------- three ways


@dataclass(frozen=True, eq=False)
class LaidOut:
    """``plan[rank][micro_batch]`` are indices of answers; ``padded``: what each answer takes up; ``fixed``: a pack at most."""

    plan: list[list[np.ndarray]]
    padded: np.ndarray
    fixed: int


def packed(case: Case) -> LaidOut:
    plan = plan_micro_batches(
        case.lengths,
        token_budget=case.budget,
        num_ranks=case.num_ranks,
        multiple=case.multiple,
        sequence_multiple=case.sequence_multiple,
        hidden_size=case.hidden,
    )
    return LaidOut(plan, case.padded, case.budget)


def first_fit(case: Case) -> LaidOut:
    padded, plan = case.padded, []
    for rank in range(case.num_ranks):
        bins: list[list[int]] = []
        rooms: list[int] = []
        for answer in range(rank, len(padded), case.num_ranks):
            length = int(padded[answer])
            place = next((k for k, room in enumerate(rooms) if room >= length), len(bins))
            if place == len(bins):
                bins.append([])
                rooms.append(case.budget // case.multiple * case.multiple)
            bins[place].append(answer)
            rooms[place] -= length
        plan.append([np.array(members) for members in bins])
    return LaidOut(plan, padded, case.budget)


def one_a_row(case: Case) -> LaidOut:
    longest = int(round_up(case.lengths, case.multiple).max())
    rows = max(1, case.budget // longest)
    own = [np.arange(rank, len(case.lengths), case.num_ranks) for rank in range(case.num_ranks)]
    plan = [[members[k : k + rows] for k in range(0, len(members), rows)] for members in own]
    return LaidOut(plan, np.full_like(case.lengths, longest), rows * longest)


# ---------------------------------------------------------------------------------------------------------------- a table


@dataclass(frozen=True, eq=False)
class Figures:
    """Of one mini-batch: packs of a rank; tokens of all ranks; per rank the costs of real tokens and of all it computes."""

    packs: int
    fixed_tokens: int
    tokens: int
    real_costs: np.ndarray
    costs: np.ndarray


def figures(case: Case, laid_out: LaidOut) -> Figures:
    plan, padded = laid_out.plan, laid_out.padded
    packs = max(len(rank) for rank in plan)
    used = [np.array([padded[members].sum() for members in rank]) for rank in plan]
    padding = [round_up(each, case.multiple) - each for each in used]
    return Figures(
        packs=packs,
        fixed_tokens=packs * case.num_ranks * laid_out.fixed,
        tokens=sum(int(each.sum()) for each in used + padding),
        real_costs=np.array([sum(case.cost(case.lengths[members]) for members in rank) for rank in plan]),
        costs=np.array([sum(case.cost(padded[members]) for members in rank) for rank in plan])
        + np.array([case.cost(each) for each in padding]),
    )


def print_layout(name: str, minibatches: list[Case], repeats: int) -> tuple[float, float, float]:
    """One row a way; returns what there are goals for: real tokens in fixed packs, heaviest rank, seconds."""
    seconds, laid_out = timed({way: partial(map_all, way, minibatches) for way in (packed, first_fit, one_a_row)}, repeats)
    work = [heaviest_packs(*each) for each in zip(minibatches, laid_out[packed], strict=True)]
    pack_seconds = timed({pack: partial(map_all, pack_rank, work)}, repeats)[0][pack]
    real = sum(int(case.lengths.sum()) for case in minibatches)
    ideal = sum(case.cost(case.lengths) / case.num_ranks for case in minibatches)
    goals = []
    for way, each in laid_out.items():
        of_all = [figures(*pair) for pair in zip(minibatches, each, strict=True)]
        fixed = real / sum(f.fixed_tokens for f in of_all)
        heaviest = sum(f.real_costs.max() for f in of_all) / sum(f.real_costs.mean() for f in of_all)
        goals.append((fixed, heaviest, seconds[way] + pack_seconds))
        print_row(
            f"{name:10} | {way.__name__.replace('_', ' '):9}",
            sum(f.packs for f in of_all),
            fixed,
            real / sum(f.tokens for f in of_all),
            heaviest,
            sum(f.costs.max() for f in of_all) / ideal,
            f"{seconds[way]:6.2f} | " + (f"{pack_seconds:6.2f}" if way is packed else f"{'':6}"),
        )
    budget, num_ranks = minibatches[0].budget, minibatches[0].num_ranks
    fewest = sum(-(-int(case.lengths.sum()) // (budget * num_ranks)) for case in minibatches)
    print_row(f"{name:10} | limit    ", fewest, real / (fewest * num_ranks * budget), 1, 1, 1, f"{'':6} | {'':6}")
    return goals[0]


def print_row(name: str, packs: int, fixed: float, real: float, heaviest: float, step: float, seconds: str) -> None:
    print(f"| {name} | {packs:5} | {fixed:11.4f} | {real:5.3f} | {heaviest:8.4f} | {step:12.3f} | {seconds} |", flush=True)


def heaviest_packs(case: Case, laid_out: LaidOut) -> tuple[Case, list[list[AnswerTokens]]]:
    """The micro-batches of the rank that has most to do, with their tokens."""
    rank = laid_out.plan[int(figures(case, laid_out).costs.argmax())]
    return case, [[_tokens(case.lengths[i]) for i in members] for members in rank]


def _tokens(length: int) -> AnswerTokens:
    prompt, answer = np.split(np.ones(length, dtype=np.int32), [50])
    return AnswerTokens(prompt, answer, np.zeros(len(answer), dtype=np.float32))


def pack_rank(work: tuple[Case, list[list[AnswerTokens]]]) -> None:
    case, micro_batches = work
    for answers in micro_batches:
        context_shard(pack(answers, multiple=case.multiple, sequence_multiple=case.sequence_multiple), 0, case.context)


def map_all(function: Callable, items: list) -> list:
    return [function(item) for item in items]


def timed(ways: dict[Callable, Callable[[], list]], repeats: int) -> tuple[dict[Callable, float], dict[Callable, list]]:
    """Median seconds of CPU time, and what each way returned."""
    seconds: dict[Callable, list[float]] = {way: [] for way in ways}
    results = {}
    for _ in range(repeats):
        for way, run in ways.items():
            started = time.process_time()
            results[way] = run()
            seconds[way].append(time.process_time() - started)
    return {way: statistics.median(values) for way, values in seconds.items()}, results


# -------------------------------------------------------------------------------------------------- order in a pipeline


def orders(minibatches: list[Case], num_stages: int) -> Iterator[list[float]]:
    """For each rank and mini-batch the time of each order / that of equal micro-batches."""
    for case in minibatches:
        for rank in packed(case).plan:
            as_they_come = np.array([case.cost(case.lengths[members]) for members in sorted(rank, key=lambda m: m.min())])
            largest_first = np.sort(as_they_come)[::-1]
            in_the_middle = np.concatenate([largest_first[::-1][::2], largest_first[len(largest_first) % 2 :: 2]])
            equal = (len(rank) + num_stages - 1) * 3 * as_they_come.mean()
            yield [
                one_forward_one_backward(order, num_stages) / equal
                for order in (largest_first, largest_first[::-1], as_they_come, in_the_middle)
            ]


def one_forward_one_backward(forward_times: np.ndarray, num_stages: int) -> float:
    """When the last stage is done: all stages take equally long, a backward pass twice as long as its forward pass."""
    num = len(forward_times)
    done: dict[tuple[str, int, int], float] = {}
    clocks = [0.0] * num_stages
    todo = []
    for stage in range(num_stages):
        warmup = min(num_stages - stage - 1, num)
        steady = [step for i in range(num - warmup) for step in (("forward", i + warmup), ("backward", i))]
        todo.append([("forward", i) for i in range(warmup)] + steady + [("backward", i) for i in range(num - warmup, num)])
    while any(todo):
        for stage, steps in enumerate(todo):
            while steps:
                kind, i = steps[0]
                source = (kind, stage - 1 if kind == "forward" else stage + 1, i)
                if source not in done and 0 <= source[1] < num_stages:
                    break
                duration = forward_times[i] * (1 if kind == "forward" else 2)
                clocks[stage] = done[kind, stage, i] = max(clocks[stage], done.get(source, 0.0)) + duration
                steps.pop(0)
    return max(clocks)


if __name__ == "__main__":
    main()
