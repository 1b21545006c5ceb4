"""Time from the trainer's weights to servers that serve them, against a raw copy of the same bytes.

    python benchmarks/weight_sync.py [--layers 12] [--hidden 1024] [--rounds 5] [--servers 1] [--ways folder transfer]

Starts real vLLM servers (``make vllm``) of a random Qwen2 and publishes its weights again and again, by files in --folder and
by broadcast, each round side by side with what no sync by files can beat: writing the bytes to the same disk and flushing them
(``write + fsync``), and copying them once in memory. Prints medians and ratios. A sync is all of it: hashing on both sides,
writing, pausing, reading, loading, comparing fingerprints, canary.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from nft_megatron.config.fleet import FleetConfig
from nft_megatron.rollout.fleet.fleet import Fleet
from nft_megatron.rollout.fleet.server import Server, ServerSettings, new_key
from nft_megatron.weights.fingerprint import tensor_bytes, weights_fingerprint

VOCABULARY = 1024
START_SECONDS = 600.0


def make_model(folder: Path, layers: int, hidden: int) -> dict[str, torch.Tensor]:
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    model = Qwen2ForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab={str(number): number for number in range(VOCABULARY)}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def raw_copy(weights: dict[str, torch.Tensor], path: Path) -> None:
    """The bytes, written and flushed: one file, one write a tensor."""
    with path.open("wb", buffering=0) as file:
        for tensor in weights.values():
            data = tensor_bytes(tensor)
            while data:
                data = data[file.write(data) :]
        os.fsync(file.fileno())
    path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--ways", nargs="+", default=["folder", "transfer"])
    parser.add_argument("--folder", type=Path, help="where the weights' files go (default: the temporary folder)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        root = Path(scratch)
        weights = make_model(root / "model", options.layers, options.hidden)
        num_bytes = sum(tensor.nbytes for tensor in weights.values())
        print(f"{num_bytes / 1e9:.2f} GB in {len(weights)} tensors, {options.servers} server(s), {options.rounds} rounds")
        print(
            f"machine: {os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
        )
        settings = ServerSettings(root / "model", root / "fleet", root / "logs", new_key(), max_model_len=256)
        (root / "fleet").mkdir()
        (root / "key").write_text(settings.api_key)
        servers = [Server(settings, f"server-{index}", seed=index) for index in range(options.servers)]
        try:
            for server in servers:
                server.wait_until_up(START_SECONDS)
            for way in options.ways:
                section = FleetConfig(
                    urls=tuple(server.url for server in servers),
                    key_file=root / "key",
                    weights=way,
                    keep_copy=False,
                    min_servers=options.servers,
                )
                show(way, measure(Fleet(section, settings, root / "weights"), weights, root / "raw", options.rounds))
        finally:
            for server in servers:
                server.stop(0)


def measure(fleet: Fleet, weights: dict[str, torch.Tensor], path: Path, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each round; a first one, in which the model is compared too, is left out."""
    times: dict[str, list[float]] = defaultdict(list)
    fleet.start()
    try:
        fleet.publish(weights.items(), 1)
        for version in range(2, num_rounds + 2):
            times["sync"].append(timed(lambda version=version: fleet.publish(weights.items(), version)))
            times["write + fsync"].append(timed(lambda: raw_copy(weights, path)))
            times["copy in memory"].append(timed(lambda: [tensor.clone() for tensor in weights.values()]))
            times["hash on one thread"].append(timed(lambda: weights_fingerprint(weights.items())))
    finally:
        fleet.close()
    return times


def show(way: str, times: dict[str, list[float]]) -> None:
    sync = statistics.median(times["sync"])
    print(f"{way}: {sync:.2f} s (from {min(times['sync']):.2f} to {max(times['sync']):.2f})")
    for kind, values in times.items():
        if kind != "sync":
            ratios = [one / other for one, other in zip(times["sync"], values, strict=True)]
            print(f"    {statistics.median(ratios):5.1f} × {kind}, {statistics.median(values):.2f} s")


if __name__ == "__main__":
    main()
