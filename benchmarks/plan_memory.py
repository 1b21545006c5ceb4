"""Peak memory that `plan` predicts beside what a process takes: an update on one CPU core, each case a process of its own.

    python benchmarks/plan_memory.py [--tokens 2048] [--repeats 1] [--shapes wide deep] [--dtypes …] [--recompute …]

Measured is the process's high-water mark (VmHWM) above what it held just before the model was built, over building and one of
the trainer's own updates on one full pack. Twice: with every freed block given back to the kernel at once
(MALLOC_MMAP_THRESHOLD_=65536), which is what a run needs; and as glibc is by default, which keeps freed blocks of up to 32 MiB
for later and cannot always use them again. The prediction is of the first. A repeat differs by less than 0.1 %; with several,
both ways take turns and the table shows medians.

Goal: predictions within 10 % of what is needed. The second ratio is to what glibc makes of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

SHAPES = {  # layers, hidden, MLP units, query heads, key heads
    "wide": (8, 1024, 2816, 16, 4),
    "deep": (12, 512, 1408, 8, 2),
    "small": (4, 256, 704, 4, 2),  # for tests/plan/test_peak.py
}
VOCABULARY = 32768
LENGTHS = (0.28, 0.24, 0.2, 0.16, 0.12)
"""Shares of the pack that its sequences have: they differ, so the attention pads some rows."""
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def shape_of(name: str):
    from nft_megatron.weights.shape import ModelShape

    layers, hidden, ffn, heads, groups = SHAPES[name]
    return ModelShape(
        architecture="Qwen2ForCausalLM",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=64,
        vocab_size=VOCABULARY,
        norm_epsilon=1e-6,
        rope_theta=1e4,
        max_positions=16384,
        tied_embeddings=False,
        qkv_bias=True,
    )


def predict(name: str, dtype: str, recompute: str, tokens: int):
    from nft_megatron.plan.layouts import ParallelLayout
    from nft_megatron.plan.memory import stage_memory

    layout = ParallelLayout(1, 1, 1, 1, 1, True, recompute, tokens)
    return stage_memory(shape_of(name), layout, 0, dtype=dtype, on_gpu=False, num_micro_batches=1)


def status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(name: str, dtype: str, recompute: str, tokens: int) -> dict[str, int]:
    """In this process: bytes above those before building, at the peak of building and of an update."""
    import numpy as np
    import torch
    import torch._dynamo  # torch's optimizers import it as they are made

    from nft_megatron.algorithms import build_algorithm
    from nft_megatron.base.records import AnswerTokens
    from nft_megatron.batching.batch import MicroBatch, MiniBatch
    from nft_megatron.batching.minibatches import BatchingRules
    from nft_megatron.batching.packing import pack
    from nft_megatron.config.sections import OptimizerConfig
    from nft_megatron.model.build import build_model
    from nft_megatron.model.optimizer import PolicyOptimizer
    from nft_megatron.model.step import Trainer
    from nft_megatron.model.topology import init_topology

    topology = init_topology(threads=1)
    shape, rng = shape_of(name), np.random.default_rng(0)
    lengths = [round(share * tokens) for share in LENGTHS[:-1]]
    lengths.append(tokens - sum(lengths))
    answers = [
        AnswerTokens(rng.integers(0, VOCABULARY, 8), rng.integers(0, VOCABULARY, length - 8), np.full(length - 8, -10.0))
        for length in lengths
    ]
    packed = pack(answers)
    num = len(packed.targets_N)
    micro_batch = MicroBatch(
        packed,
        weight_N=torch.full((num,), 1 / num),
        is_correct_N=packed.answer_N % 2 == 0,
        correct_rate_N=torch.full((num,), 0.5),
        engine_logprob_N=torch.full((num,), -10.0),
        is_stale_N=torch.zeros(num, dtype=torch.bool),
        old_logprob_N=torch.full((num,), -10.0),
    )
    kind = getattr(torch, dtype)
    torch.ones(64, 64, dtype=kind) @ torch.ones(64, 64, dtype=kind)  # loads the libraries' kernels

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    chunks = build_model(shape, topology, dtype=kind, recompute=recompute)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.uniform_(-0.02, 0.02)
    optimizer = PolicyOptimizer(chunks, OptimizerConfig(learning_rate=1e-6, warmup_updates=0))
    built = status("VmRSS") - before
    rules = BatchingRules(
        num_updates=1,
        num_ranks=1,
        token_budget=tokens,
        hidden_size=shape.hidden_size,
        denominator="tokens",
        seed=0,
        tensor_size=1,
        context_size=1,
        count_multiple=1,
        pad_to_budget=False,
    )
    trainer = Trainer(topology, shape, chunks, optimizer, build_algorithm("nft"), rules, 1.0)
    stats = trainer.update(MiniBatch((micro_batch,), num))
    assert stats.applied.grad_norm > 0
    return {"built": built, "peak": status("VmHWM") - before}


def run(case: tuple[str, str, str], tokens: int, environment: dict[str, str]) -> dict[str, int]:
    command = [sys.executable, __file__, "--tokens", str(tokens), "--one", *case]
    result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(case)} ended with {result.returncode}\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of the pack (default: 2048)")
    parser.add_argument("--repeats", type=int, default=1, help="processes a case and allocator (default: 1)")
    parser.add_argument("--shapes", nargs="*", default=["wide", "deep"])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--recompute", nargs="*", default=["none", "selective", "full"])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.tokens)), flush=True)
        os._exit(0)  # the process groups need no farewell

    import torch

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one used; torch {torch.__version__}")
    for name in options.shapes:
        layers, hidden, ffn, *_ = SHAPES[name]
        print(f"{name}: {layers} layers, hidden {hidden}, MLP {ffn}, vocabulary {VOCABULARY}; {options.tokens} tokens")
    print("\nMB of 10^6 bytes: static = parameters, gradients, optimizer, and what the process held once they were built")
    columns = "shape dtype recompute static built activations working LM-head peak needed ratio default ratio"
    widths = (6, 9, 10, 7, 6, 12, 8, 8, 7, 7, 6, 8, 6)
    print("".join(f"{column:>{width}}" for column, width in zip(columns.split(), widths, strict=True)))
    worst = 0.0
    for case in itertools.product(options.shapes, options.dtypes, options.recompute):
        expected = predict(*case, options.tokens)
        pairs = [[run(case, options.tokens, kind) for kind in (GIVE_BACK, {})] for _ in range(options.repeats)]
        needed, default = (statistics.median(pair[kind]["peak"] for pair in pairs) for kind in (0, 1))
        built = statistics.median(pair[0]["built"] for pair in pairs)
        static = expected.parameters + expected.gradients + expected.optimizer
        numbers = [static, built, expected.activations, expected.working, expected.lm_head, expected.peak, needed]
        texts = [*case, *(f"{number / 1e6:.0f}" for number in numbers), f"{expected.peak / needed:.3f}"]
        texts += [f"{default / 1e6:.0f}", f"{expected.peak / default:.3f}"]
        print("".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True)), flush=True)
        worst = max(worst, abs(expected.peak / needed - 1))
    print(f"\nworst prediction {worst:.1%} off (goal: 10 %)")


if __name__ == "__main__":
    main()
