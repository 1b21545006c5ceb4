"""What a checkpoint costs each of several data-parallel ranks: bytes written and read, host memory, seconds.

A model of 135 million parameters in bfloat16, with random weights, master weights and moments, is saved by --ranks processes,
then overwritten with zeros, restored and compared to the bit. No updates are run: what they need is not measured here.

  written     the rank's file, and / an equal share of all files
  memory      most of the process's memory while it saves, above what it held before (VmHWM), / what it writes
  read        bytes by the kernel's count (/proc/self/io) while it loads, / what it wrote
  memory      the same while it loads, / what it reads
  copy, write, load
              seconds; training waits for the copy alone if checkpoints are asynchronous

Goal: written within 10 % of an equal share, at most 1.2 times as much memory while saving, every byte read once.

    python benchmarks/checkpoint_parallel.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import socket
import tempfile
import time
from pathlib import Path

import megatron.core
import torch
import torch._dynamo  # torch's optimizers import it as they are made
import torch.distributed.checkpoint

from nft_megatron.config.sections import OptimizerConfig
from nft_megatron.model.build import Chunks, build_model
from nft_megatron.model.checkpoint import load_checkpoint, take_snapshot
from nft_megatron.model.control import together
from nft_megatron.model.optimizer import PolicyOptimizer
from nft_megatron.model.topology import init_topology
from nft_megatron.weights import ModelShape, num_parameters

SHARE, MEMORY = 0.1, 1.2
"""Most relative difference from an equal share, and most memory while saving / bytes written."""


def shape_of(layers: int, hidden: int, vocabulary: int) -> ModelShape:
    return ModelShape(
        architecture="Qwen2ForCausalLM",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=hidden * 11 // 4,
        num_attention_heads=hidden // 64,
        num_query_groups=max(1, hidden // 256),
        head_dim=64,
        vocab_size=vocabulary,
        norm_epsilon=1e-6,
        rope_theta=1e4,
        max_positions=4096,
        tied_embeddings=False,
        qkv_bias=True,
    )


def number(file: str, field: str) -> int:
    """Of /proc/self/``file``; sizes in bytes."""
    line = next(line for line in Path("/proc/self", file).read_text().splitlines() if line.startswith(field + ":"))
    words = line.split()
    return int(words[1]) * (1024 if words[-1] == "kB" else 1)


class Peak:
    """Bytes of memory above those at its start, at most, until ``stop``."""

    def __init__(self) -> None:
        self._before = number("status", "VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew

    def stop(self) -> int:
        return number("status", "VmHWM") - self._before


def state(chunks: Chunks, optimizer: PolicyOptimizer) -> list[torch.Tensor]:
    """Weights, then this rank's master weights and moments."""
    tensors = [parameter.detach() for chunk in chunks for parameter in chunk.parameters()]
    for part in optimizer.megatron.chained_optimizers:
        for master, moments in part.optimizer.state.items():
            tensors += [master.detach(), moments["exp_avg"], moments["exp_avg_sq"]]
    return tensors


def digest(tensors: list[torch.Tensor]) -> str:
    found = hashlib.blake2b()
    for tensor in tensors:
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def run_rank(rank: int, num_ranks: int, port: int, shape: ModelShape, folder: Path, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    topology = init_topology(threads=1)
    chunks = build_model(shape, topology, dtype=torch.bfloat16)
    optimizer = PolicyOptimizer(chunks, OptimizerConfig(learning_rate=1e-6, warmup_updates=0))
    tensors = state(chunks, optimizer)
    num_weights = sum(1 for chunk in chunks for _ in chunk.parameters())
    for index, tensor in enumerate(tensors):  # weights alike on all ranks
        tensor.normal_(generator=torch.Generator().manual_seed(index if index < num_weights else index + 1000 * rank))
    expected = digest(tensors)
    together(topology, lambda: None)

    start, peak = time.monotonic(), Peak()
    snapshot = take_snapshot(chunks, optimizer, topology, {})
    copied = time.monotonic()
    snapshot.write(folder, topology)
    written, saving = time.monotonic(), peak.stop()
    del snapshot
    for tensor in tensors:
        tensor.zero_()
    together(topology, lambda: None)

    begin, before, peak = time.monotonic(), number("io", "rchar"), Peak()
    load_checkpoint(folder, chunks, optimizer, topology)
    result = {
        "written": (folder / f"__{rank}_0.distcp").stat().st_size,
        "saving": saving,
        "read": number("io", "rchar") - before,
        "loading": peak.stop(),
        "seconds": [copied - start, written - copied, time.monotonic() - begin],
        "equal": digest(state(chunks, optimizer)) == expected,
    }
    (out / f"rank{rank}.json").write_text(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32768)
    options = parser.parse_args()
    shape = shape_of(options.layers, options.hidden, options.vocabulary)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as temporary:
        out, folder = Path(temporary), Path(temporary) / "checkpoint"
        folder.mkdir()
        fork = multiprocessing.get_context("fork")
        arguments = [(rank, options.ranks, port, shape, folder, out) for rank in range(options.ranks)]
        processes = [fork.Process(target=run_rank, args=each) for each in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert not any(process.exitcode for process in processes), "a rank failed"
        ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(options.ranks)]
        total = sum(path.stat().st_size for path in folder.iterdir())
    share = total / options.ranks
    print(f"# python benchmarks/checkpoint_parallel.py · {platform.machine()}, torch {torch.__version__}, ", end="")
    print(f"megatron-core {megatron.core.__version__}")
    print(f"{num_parameters(shape):,} parameters, {options.ranks} ranks: {total / 1e6:,.1f} MB, {share / 1e6:,.1f} MB each")
    print("| rank | MB written | / share | memory | / written | MB read | / written | memory | / read | copy | write | load |")
    print("|-----:|-----------:|--------:|-------:|----------:|--------:|----------:|-------:|-------:|-----:|------:|-----:|")
    for rank, each in enumerate(ranks):
        written, read, (copy, write, load) = each["written"], each["read"], each["seconds"]
        print(
            f"| {rank:4} | {written / 1e6:10.1f} | {written / share:7.3f} | {each['saving'] / 1e6:6.1f} | "
            f"{each['saving'] / written:9.3f} | {read / 1e6:7.1f} | {read / written:9.3f} | "
            f"{each['loading'] / 1e6:6.1f} | {each['loading'] / read:6.3f} | {copy:4.2f} | {write:5.2f} | {load:4.2f} |"
        )
    assert all(each["equal"] for each in ranks), "restored to the bit"
    uneven = max(abs(each["written"] / share - 1) for each in ranks)
    memory = max(each["saving"] / each["written"] for each in ranks)
    read = sum(each["read"] for each in ranks) / total
    print("restored to the bit on every rank")
    print(f"goal: within {SHARE:.0%} of an equal share: {uneven:.1%}, {'met' if uneven <= SHARE else 'missed'}")
    print(f"goal: memory while saving / written <= {MEMORY}: {memory:.3f}, {'met' if memory <= MEMORY else 'missed'}")
    print(f"goal: every byte read once: all ranks read {read:.4f} times the files")


if __name__ == "__main__":
    main()
