"""Time and memory of log-probs through the LM head, forward and backward, beside how others make them.

Every way goes from hidden states [T, H], a weight [V, H] and T targets to the gradients of hidden states and weight:

  products, 8 / 6 THV     the limit: the matrix products alone (8: logits twice, two gradients), in chunks, into existing memory
  full logits             log_softmax of all logits in float32; also with an entropy that has a gradient
  Megatron                vocab_parallel_cross_entropy of Megatron-Core on all logits; also made again in the backward pass
  verl-like               log-prob and entropy, both with gradient, by one logsumexp and a softmax of all logits in float32
  NeMo-RL-like            all logits in the inputs' dtype; their log_softmax in float32 chunks, again in the backward pass
  token_logprobs          this package in two passes; also with the entropy's gradient, and adding to an existing main_grad
  token_loss_sum          this package in one pass, with the loss of NFT; also adding to an existing main_grad; on CUDA with its
                          kernels and with torch's operators

The peers are a few lines each, after their algorithms. Every measurement is a process of its own. Memory is the peak of the
whole process above its inputs (a main_grad is one of them), on CUDA that of the allocator. Time is CPU time of one thread after
a warm-up on tiny inputs; on CUDA time between events, the median of five runs after one. So that the machine's noise hits all
alike, the ways take turns within each repeat; the table shows medians over the repeats, and a ratio is the median of the ratios
within a repeat.

Goals, on the CPU: token_logprobs at most 1.4 x the time of Megatron that makes the logits again, token_loss_sum 1.05 x; 1/7 of
the memory of full logits, with and without entropy, and in bfloat16 at most 0.9 GiB.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # read when torch is imported

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nft_megatron.algorithms import TokenBatch, build_algorithm
from nft_megatron.model.logprob import token_logprobs
from nft_megatron.model.token_loss import token_loss_sum

FULL, FULL_ENTROPY = "full logits", "full logits, entropy"
MEGATRON, MEGATRON_AGAIN = "Megatron", "Megatron, logits again"
OPERATORS = "token_loss_sum, operators"
LIMIT_8, LIMIT_6 = "products, 8 THV", "products, 6 THV"


def parse_arguments() -> argparse.Namespace:
    on_cuda = torch.cuda.is_available()
    tokens, hidden, vocab = (16384, 5120, 152064) if on_cuda else (4096, 512, 151936)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda" if on_cuda else "cpu", help="(%(default)s)")
    add("--tokens", type=int, default=tokens, help="T (%(default)s)")
    add("--hidden", type=int, default=hidden, help="H (%(default)s)")
    add("--vocab", type=int, default=vocab, help="V (%(default)s)")
    add("--chunk", type=int, default=None, help="tokens of a chunk of this package's (its default)")
    add("--dtypes", nargs="+", default=["bfloat16"] if on_cuda else ["bfloat16", "float32"], help="(%(default)s)")
    ways = [way for way in WAYS if on_cuda or way != OPERATORS]
    add("--ways", nargs="+", default=ways, metavar="WAY", help="some of: " + "; ".join(WAYS))
    add("--repeats", type=int, default=1 if on_cuda else 3, help="rounds in which all ways take turns (%(default)s)")
    add("--measure", nargs=2, metavar=("WAY", "DTYPE"), help="one way in this process, as JSON")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------------------ ways


class Inputs(NamedTuple):
    """And what comes in for the gradients of log-prob and entropy. N is T here: every token has a loss."""

    hidden_NH: Tensor
    weight_VH: Tensor
    targets_N: Tensor
    upstream_N: Tensor
    entropy_upstream_N: Tensor
    main_grad_VH: Tensor | None
    chunk_size: int | None


def make_inputs(
    num_tokens: int, hidden: int, vocab: int, dtype: torch.dtype, device: str, with_main_grad: bool, chunk_size: int | None
) -> Inputs:
    torch.manual_seed(0)
    return Inputs(
        torch.randn(num_tokens, hidden, dtype=dtype, device=device).requires_grad_(),
        torch.randn(vocab, hidden, dtype=dtype, device=device).mul_(hidden**-0.5).requires_grad_(),
        torch.randint(vocab, (num_tokens,), device=device),
        torch.randn(num_tokens, device=device),
        torch.randn(num_tokens, device=device),
        torch.zeros(vocab, hidden, device=device) if with_main_grad else None,
        chunk_size,
    )


def products(inputs: Inputs, times_logits: int) -> None:
    hidden_NH, weight_VH = inputs.hidden_NH.detach(), inputs.weight_VH.detach()
    logits_CV = hidden_NH.new_empty(min(1024, len(hidden_NH)), len(weight_VH))
    hidden_grad_NH, weight_grad_VH = torch.empty_like(hidden_NH), torch.empty_like(weight_VH)
    for hidden_CH, grad_CH in zip(hidden_NH.split(1024), hidden_grad_NH.split(1024), strict=True):
        for _ in range(times_logits):
            torch.matmul(hidden_CH, weight_VH.t(), out=logits_CV[: len(hidden_CH)])
        torch.matmul(logits_CV[: len(hidden_CH)], weight_VH, out=grad_CH)
        torch.matmul(logits_CV[: len(hidden_CH)].t(), hidden_CH, out=weight_grad_VH)


def full_logits(inputs: Inputs, with_entropy: bool) -> None:
    logits_NV = (inputs.hidden_NH @ inputs.weight_VH.t()).float()
    logp_NV = logits_NV.log_softmax(-1)
    del logits_NV
    total = (logp_NV.gather(1, inputs.targets_N[:, None]).squeeze(1) * inputs.upstream_N).sum()
    if with_entropy:
        total = total - ((logp_NV.exp() * logp_NV).sum(-1) * inputs.entropy_upstream_N).sum()
    del logp_NV
    total.backward()


def megatron(inputs: Inputs, again: bool) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    if not torch.distributed.is_initialized():
        backend = "nccl" if inputs.hidden_NH.is_cuda else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()

    def loss(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(hidden_NH @ weight_VH.t(), inputs.targets_N)

    if again:
        loss_N = checkpoint(loss, inputs.hidden_NH, inputs.weight_VH, use_reentrant=False)
    else:
        loss_N = loss(inputs.hidden_NH, inputs.weight_VH)
    (loss_N * inputs.upstream_N).sum().backward()


def verl_like(inputs: Inputs) -> None:
    logits_NV = (inputs.hidden_NH @ inputs.weight_VH.t()).float()
    log_sum_exp_N = logits_NV.logsumexp(-1)
    logprob_N = logits_NV.gather(1, inputs.targets_N[:, None]).squeeze(1) - log_sum_exp_N
    entropy_N = log_sum_exp_N - (logits_NV.softmax(-1) * logits_NV).sum(-1)
    del logits_NV
    (logprob_N * inputs.upstream_N + entropy_N * inputs.entropy_upstream_N).sum().backward()


class ChunkedLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        ctx.save_for_backward(logits_NV, targets_N)
        chunks = zip(logits_NV.split(1024), targets_N[:, None].split(1024), strict=True)
        return torch.cat([logits_CV.float().log_softmax(-1).gather(1, targets_C1) for logits_CV, targets_C1 in chunks])[:, 0]

    @staticmethod
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets_N = ctx.saved_tensors
        chunks = zip(*(each.split(1024) for each in (logits_NV, targets_N[:, None], upstream_N[:, None])), strict=True)
        grads = []
        for logits_CV, targets_C1, upstream_C1 in chunks:
            grad_CV = logits_CV.float().softmax(-1).mul_(-upstream_C1).scatter_add_(1, targets_C1, upstream_C1)
            grads.append(grad_CV.to(logits_CV.dtype))
        return torch.cat(grads), None


def nemo_rl_like(inputs: Inputs) -> None:
    logprob_N = ChunkedLogSoftmax.apply(inputs.hidden_NH @ inputs.weight_VH.t(), inputs.targets_N)
    (logprob_N * inputs.upstream_N).sum().backward()


def options(inputs: Inputs) -> dict[str, Any]:
    return {
        "temperature": 1.0,
        "vocab_size": len(inputs.weight_VH),
        "group": None,
        "main_grad_VH": inputs.main_grad_VH,
        "chunk_size": inputs.chunk_size,
    }


def two_passes(inputs: Inputs, entropy: str = "none") -> None:
    result = token_logprobs(*inputs[:3], **options(inputs), entropy=entropy)
    total = (result.logprob_N * inputs.upstream_N).sum()
    if entropy == "gradient":
        total = total + (result.entropy_N * inputs.entropy_upstream_N).sum()
    total.backward()


def one_pass(inputs: Inputs, fused: bool = True) -> None:
    token_loss = build_algorithm("nft").token_loss
    old_logprob_N, is_correct_N = -12 + inputs.entropy_upstream_N, inputs.upstream_N > 0
    rate_N = torch.full_like(inputs.upstream_N, 0.4)

    def loss_of(logprob_C: Tensor, chunk: slice) -> Tensor:
        batch = TokenBatch(logprob_C, old_logprob_N[chunk], is_correct_N[chunk], rate_N[chunk])
        return inputs.upstream_N[chunk].abs() * token_loss(batch).loss_N

    token_loss_sum(*inputs[:3], loss_of, **options(inputs), fused=fused)[0].backward()


WITH_MAIN_GRAD = ", main_grad"
WAYS: dict[str, Callable[[Inputs], None]] = {
    LIMIT_8: lambda inputs: products(inputs, 2),
    LIMIT_6: lambda inputs: products(inputs, 1),
    FULL: lambda inputs: full_logits(inputs, False),
    FULL_ENTROPY: lambda inputs: full_logits(inputs, True),
    MEGATRON: lambda inputs: megatron(inputs, False),
    MEGATRON_AGAIN: lambda inputs: megatron(inputs, True),
    "verl-like, entropy": verl_like,
    "NeMo-RL-like": nemo_rl_like,
    "token_logprobs": two_passes,
    "token_logprobs, entropy": lambda inputs: two_passes(inputs, "gradient"),
    "token_logprobs" + WITH_MAIN_GRAD: two_passes,
    "token_loss_sum": one_pass,
    "token_loss_sum" + WITH_MAIN_GRAD: one_pass,
    OPERATORS: lambda inputs: one_pass(inputs, fused=False),
}


# ----------------------------------------------------------------------------------------------------------- measurement


class Measurement(NamedTuple):
    seconds: float
    gibibytes: float


def measure(way: str, arguments: argparse.Namespace, dtype: torch.dtype) -> Measurement:
    torch.set_num_threads(1)
    sizes = (arguments.tokens, arguments.hidden, arguments.vocab)
    rest = (dtype, arguments.device, way.endswith(WITH_MAIN_GRAD), arguments.chunk)
    WAYS[way](make_inputs(8, 64, 1024, *rest))
    inputs = make_inputs(*sizes, *rest)
    return measure_on_cuda(way, inputs) if arguments.device == "cuda" else measure_on_cpu(way, inputs)


def measure_on_cpu(way: str, inputs: Inputs) -> Measurement:
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak of resident memory starts anew
    before, started = memory_line("VmRSS"), time.process_time()
    WAYS[way](inputs)
    return Measurement(time.process_time() - started, memory_line("VmHWM") - before)


def memory_line(name: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 2**20


def measure_on_cuda(way: str, inputs: Inputs) -> Measurement:
    before, seconds = torch.cuda.memory_allocated(), []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(6):
        inputs.hidden_NH.grad = inputs.weight_VH.grad = None
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        WAYS[way](inputs)
        ended.record()
        ended.synchronize()
        seconds.append(started.elapsed_time(ended) / 1000)
    return Measurement(statistics.median(seconds[1:]), (torch.cuda.max_memory_allocated() - before) / 2**30)


def measure_in_a_process(way: str, dtype: str) -> Measurement:
    command = [sys.executable, *sys.argv, "--measure", way, dtype]
    return Measurement(*json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]))


# ------------------------------------------------------------------------------------------------------------------ table


def ratio(results: dict[str, list[Measurement]], way: str, reference: str, what: str) -> str:
    if reference not in results:
        return "–"
    pairs = zip(results[way], results[reference], strict=True)
    return f"{statistics.median(getattr(a, what) / getattr(b, what) for a, b in pairs):.2f}"


def limit_of(way: str) -> str:
    return (
        LIMIT_6 if way in (LIMIT_6, FULL, FULL_ENTROPY, MEGATRON) or way.startswith(("verl", "NeMo", "token_loss")) else LIMIT_8
    )


def print_table(dtype: str, results: dict[str, list[Measurement]], arguments: argparse.Namespace) -> None:
    t, h, v = arguments.tokens, arguments.hidden, arguments.vocab
    print(f"\n{dtype}, T={t} H={h} V={v}, {arguments.device}, medians of {arguments.repeats} repeats")
    heads = ("GiB", "/ full logits", "/ its entropy", "seconds", "lowest–highest", f"/ {MEGATRON_AGAIN}", "/ its products")
    print(f"| {'way':26} | " + " | ".join(heads) + " |")
    print(f"|{'-' * 28}|" + "|".join("-" * (len(head) + 1) + ":" for head in heads) + "|")
    for way, measurements in results.items():
        seconds = sorted(measurement.seconds for measurement in measurements)
        cells = (
            f"{statistics.median(measurement.gibibytes for measurement in measurements):.2f}",
            ratio(results, way, FULL, "gibibytes"),
            ratio(results, way, FULL_ENTROPY, "gibibytes"),
            f"{statistics.median(seconds):.3g}",
            f"{seconds[0]:.3g}–{seconds[-1]:.3g}",
            ratio(results, way, MEGATRON_AGAIN, "seconds"),
            ratio(results, way, limit_of(way), "seconds"),
        )
        row = " | ".join(cell.rjust(len(head)) for cell, head in zip(cells, heads, strict=True))
        print(f"| {way:26} | {row} |", flush=True)
    print_goals(results)


def print_goals(results: dict[str, list[Measurement]]) -> None:
    for way, reference, what, goal in (
        ("token_logprobs", MEGATRON_AGAIN, "seconds", 1.4),
        ("token_loss_sum", MEGATRON_AGAIN, "seconds", 1.05),
        ("token_logprobs", FULL, "gibibytes", 1 / 7),
        ("token_logprobs, entropy", FULL_ENTROPY, "gibibytes", 1 / 7),
    ):
        if way in results and reference in results:
            print(f"goal: {what} of {way} / {reference} {ratio(results, way, reference, what)} (<= {goal:.2f})", flush=True)


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure:
        way, dtype = arguments.measure
        print(json.dumps(measure(way, arguments, getattr(torch, dtype))))
        return
    for dtype in arguments.dtypes:
        results: dict[str, list[Measurement]] = {way: [] for way in arguments.ways}
        for _ in range(arguments.repeats):
            for way in arguments.ways:
                results[way].append(measure_in_a_process(way, dtype))
        print_table(dtype, results, arguments)


if __name__ == "__main__":
    main()
