"""A whole training step on one device: tokens/s, model FLOPs utilisation and peak memory by phase, beside roofline and plan.

    python benchmarks/train_step.py                     # a small model on the CPU
    python benchmarks/train_step.py --shape 1.5b        # Qwen2.5-1.5B's sizes, 16K packed tokens, on a GPU

Two limits are measured in the same run: the largest square matrix product that the device does (what the FLOPs utilisation is
relative to, next to the vendor's figure), and a copy of memory. Weights are random, answers made up, and everything else is the
trainer's own: the step is read from a ledger, old log-probs are recomputed, NFT's loss, one update a mini-batch.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from nft_megatron.algorithms import build_algorithm
from nft_megatron.base.records import Answer, Completion, Group, Prompt, Verdict
from nft_megatron.batching.minibatches import BatchingRules
from nft_megatron.batching.packing import PackedBatch
from nft_megatron.config.sections import OptimizerConfig
from nft_megatron.data.ledger import write_ledger
from nft_megatron.model.build import build_model
from nft_megatron.model.optimizer import PolicyOptimizer
from nft_megatron.model.step import Trainer
from nft_megatron.model.topology import Topology, distributed
from nft_megatron.plan.compute import model_flops
from nft_megatron.plan.hardware import accelerator
from nft_megatron.plan.layouts import ParallelLayout
from nft_megatron.plan.memory import stage_memory
from nft_megatron.plan.workload import Packs
from nft_megatron.weights import ModelShape, num_parameters

SIZES = {  # layers, hidden, MLP units, heads, key-value heads, vocabulary, tied
    "mini": (2, 64, 176, 4, 2, 512, True),  # of gpu_check.py without a GPU
    "tiny": (4, 512, 1408, 8, 2, 8192, False),
    "0.5b": (24, 896, 4864, 14, 2, 151936, True),
    "1.5b": (28, 1536, 8960, 12, 2, 151936, True),
    "3b": (36, 2048, 11008, 16, 2, 151936, True),
    "7b-slice": (8, 3584, 18944, 28, 4, 152064, False),  # of its 28 layers
}
PROMPT_TOKENS, ANSWERS_PER_GROUP = 256, 8


def shape_of(name: str) -> ModelShape:
    layers, hidden, ffn, heads, groups, vocab, tied = SIZES[name]
    return ModelShape(
        architecture="Qwen2ForCausalLM",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=hidden // heads,
        vocab_size=vocab,
        norm_epsilon=1e-6,
        rope_theta=1e6,
        max_positions=32768,
        tied_embeddings=tied,
        qkv_bias=True,
    )


def write_step(path: Path, vocab_size: int, num_tokens: int, mean_answer: int, prompt_tokens: int = PROMPT_TOKENS) -> None:
    """Groups of answers, half of them right, of exponentially distributed lengths; about ``num_tokens`` tokens in all."""
    rng, groups, used = np.random.default_rng(0), [], 0
    while used < num_tokens:
        prompt = Prompt(f"q{len(groups)}", "", "", rng.integers(0, vocab_size, prompt_tokens).astype(np.int32))
        answers = []
        for index in range(ANSWERS_PER_GROUP):
            length = int(np.clip(rng.exponential(mean_answer), 16, 4 * mean_answer))
            tokens = rng.integers(0, vocab_size, length).astype(np.int32)
            logprobs = np.full(length, -np.log(vocab_size), dtype=np.float32)
            verdict = Verdict("correct" if index % 2 else "wrong", "made up", "benchmark")
            answers.append(Answer(Completion(len(groups), index, tokens, logprobs, "stop", 0, 0.0), "", verdict))
            used += prompt_tokens + length
        groups.append(Group(len(groups), 1, prompt, tuple(answers)))
    write_ledger(path, groups, fates=["train"] * len(groups), meta={})


class Clock:
    """Seconds of the phases of a step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, {}  # type: ignore[var-annotated]

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, phase: str, action: Callable, *arguments):  # type: ignore[no-untyped-def, type-arg]
        start = self.now()
        result = action(*arguments)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self.now() - start
        return result


def best(clock: Clock, action: Callable[[], object], repeats: int = 5) -> float:
    """Least seconds of an action."""
    seconds = []
    for _ in range(repeats):
        start = clock.now()
        action()
        seconds.append(clock.now() - start)
    return min(seconds)


def limits(device: torch.device, dtype: torch.dtype, clock: Clock) -> tuple[float, float]:
    """FLOP/s of a matrix product and bytes/s of a copy, read and written."""
    rates = []
    for size in (2048, 4096, 8192) if device.type == "cuda" else (512, 1024, 2048):
        a = torch.randn(size, size, dtype=dtype, device=device)
        rates.append(2 * size**3 / best(clock, lambda a=a: a @ a))
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return max(rates), 2 * source.nbytes / best(clock, lambda: target.copy_(source))


def peak_memory(device: torch.device, reset: bool = False) -> int:
    """Bytes: what the allocator gave out on a GPU, the process's high-water mark on the CPU."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SIZES, default="tiny")
    parser.add_argument("--tokens", type=int, help="of a pack (default: 16384 on a GPU, 2048 on the CPU)")
    parser.add_argument("--packs", type=int, default=4, help="of tokens in a step, in two mini-batches (default: 4)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--gpu", help="kind of GPU, for the vendor's figure and the plan, such as h200")
    parser.add_argument("--steps", type=int, default=3, help="measured steps; the median is shown (default: 3)")
    options = parser.parse_args()
    with distributed(threads=len(os.sched_getaffinity(0)), timeout_seconds=600) as topology:
        run(options, topology)


def run(options: argparse.Namespace, topology: Topology) -> None:
    device = topology.device
    on_gpu = device.type == "cuda"
    tokens = options.tokens or (16384 if on_gpu else 2048)
    dtype_name = options.dtype or ("bfloat16" if on_gpu else "float32")
    dtype, shape, clock = getattr(torch, dtype_name), shape_of(options.shape), Clock(topology.device)
    flops_limit, bytes_limit = limits(device, dtype, clock)

    before = peak_memory(device, reset=True)
    chunks = build_model(shape, topology, dtype=dtype, recompute=options.recompute)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.normal_(std=0.02)
    optimizer = PolicyOptimizer(chunks, OptimizerConfig(learning_rate=1e-6, warmup_updates=0))
    rules = BatchingRules(2, 1, tokens, shape.hidden_size, "tokens", 0, 1, 1, 1, False)
    trainer = Trainer(topology, shape, chunks, optimizer, build_algorithm("nft"), rules, 1.0)
    apply = optimizer.step
    optimizer.step = lambda: clock.timed("optimizer", apply)  # type: ignore[method-assign]
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step_000001.parquet"
        write_step(path, shape.vocab_size, options.packs * tokens, mean_answer=tokens // 10)
        for step in range(options.steps + 1):  # the first one warms up
            clock.seconds = {}
            batch = clock.timed("old log-probs", trainer.prepare, path, 1)
            for minibatch in batch.minibatches:
                clock.timed("update", trainer.update, minibatch)
            clock.seconds["forward and backward"] = clock.seconds.pop("update") - clock.seconds["optimizer"]
            if step:
                for phase, value in clock.seconds.items():
                    seconds.setdefault(phase, []).append(value)
    peak = peak_memory(device) - (0 if on_gpu else before)
    packs = [micro_batch.packed for minibatch in batch.minibatches for micro_batch in minibatch.micro_batches]
    report(options, shape, packs, seconds, peak, flops_limit, bytes_limit, dtype_name, tokens, device)


def sums_of(packs: Sequence[PackedBatch]) -> Packs:
    """What the packs of an update have in all."""
    return Packs(
        num_micro_batches=len(packs),
        tokens=sum(len(pack.input_ids_T) for pack in packs),
        pairs=sum(length * (length + 1) // 2 for pack in packs for length in pack.lengths),
        positions=sum(len(pack.targets_N) for pack in packs),
    )


def report(options, shape, packs, seconds, peak, flops_limit, bytes_limit, dtype, tokens, device):  # type: ignore[no-untyped-def]
    medians = {phase: float(np.median(values)) for phase, values in seconds.items()}
    total = sum(medians.values())
    sums = sums_of(packs)
    num_tokens, positions = sums.tokens, sums.positions
    training = model_flops(shape, num_tokens, sums.pairs, positions)
    flops = {"old log-probs": training / 3, "forward and backward": training}
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} cores, {platform.machine()}"
    command = f"python benchmarks/train_step.py --shape {options.shape} --recompute {options.recompute}"
    print(f"# {command} · {name} · torch {torch.__version__}")
    print(
        f"{num_parameters(shape) / 1e6:,.0f} M parameters, {dtype} · {len(packs)} packs of up to {tokens:,} tokens, "
        f"{num_tokens:,} in all, {positions:,} with a loss · medians of {options.steps} steps"
    )
    print(f"limits measured here: matrix product {flops_limit / 1e12:.2f} TFLOP/s, memory {bytes_limit / 1e9:.0f} GB/s\n")
    print(f"| {'phase':<20} | {'s':>8} | {'share':>6} | {'tokens/s':>9} | {'TFLOP/s':>8} | {'of limit':>8} |")
    print(f"|{'-' * 22}|{'-' * 9}:|{'-' * 7}:|{'-' * 10}:|{'-' * 9}:|{'-' * 9}:|")
    for phase in ("old log-probs", "forward and backward", "optimizer"):
        rate = flops[phase] / medians[phase] if phase in flops else None
        speed = f"{rate / 1e12:>8.2f} | {rate / flops_limit:>8.1%}" if rate else f"{'':>8} | {'':>8}"
        seconds_and_share = f"{medians[phase]:>8.3f} | {medians[phase] / total:>6.1%}"
        print(f"| {phase:<20} | {seconds_and_share} | {num_tokens / medians[phase]:>9,.0f} | {speed} |")
    update = medians["forward and backward"] + medians["optimizer"]
    print(
        f"\nmodel FLOPs utilisation of the updates: {training / update / flops_limit:.1%} of the measured matrix product",
        end="",
    )
    gpu = accelerator(options.gpu) if options.gpu else None
    print(
        f", {training / update / gpu.flops_of(dtype):.1%} of {options.gpu}'s {gpu.flops_of(dtype) / 1e12:,.0f} TFLOP/s"
        if gpu
        else ""
    )
    planned = stage_memory(
        shape,
        ParallelLayout(1, 1, 1, 1, 1, True, options.recompute, tokens),
        0,
        dtype=dtype,
        on_gpu=device.type == "cuda",
        num_micro_batches=len(packs),
    )
    print(f"peak memory: {peak / 1e9:.2f} GB, planned {planned.peak / 1e9:.2f} GB ({planned.peak / peak:.2f})")


if __name__ == "__main__":
    main()
