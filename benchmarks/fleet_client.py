"""What the fleet's client costs: its processor time against the wall time of generating, and its memory.

The servers are processes of tests/fake_vllm.py: they speak vLLM's HTTP, send vLLM's JSON for every token, and take as long as
asked, so thousands of answers come at a fleet's rate without a model. --urls with --key and --model names real ones instead
(their weights get the label 0). Lengths are even up to --max-tokens. The client runs in a process of its own, started anew for
each of --counts; what is measured there:

  overhead     processor time of the process (all threads: HTTP, parsing, bookkeeping, handing over) / wall time of the call
  per token    the same, a token; 1 / it is what one client can take in from all servers together
  peak RSS     of the process, and how much of it came during the call; what the caller got is counted and dropped

Goals: overhead < 5 % at 10,000 answers; memory bounded by what is outstanding, so that ten times the answers add nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import httpx
import numpy as np
from transformers import Qwen2Config

from nft_megatron.base.records import Request
from nft_megatron.rollout.fleet.engine import FleetEngine

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from fake_vllm import VOCABULARY, Process, StaticFleet, sampling


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--servers", type=int, default=8, help="(%(default)s)")
    add("--counts", type=int, nargs="+", default=[1_000, 10_000], help="answers of a call (%(default)s)")
    add("--answers", type=int, default=16, help="to each prompt, with neighbouring seeds; 1: a request each (%(default)s)")
    add("--prompt-tokens", type=int, default=250, help="(%(default)s)")
    add("--max-tokens", type=int, default=2000, help="of an answer; the mean is about half (%(default)s)")
    add("--rate", type=float, default=5000.0, help="tokens/s of a server, about one H100 with 7B in training (%(default)s)")
    add("--concurrent", type=int, default=128, help="answers at a time in a server (%(default)s)")
    add("--urls", nargs="*", help="real servers instead")
    add("--key", default="none", help="of the real servers")
    add("--model", type=Path, help="model folder of the real servers")
    add("--measure", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure:
        print(json.dumps(measure(arguments, arguments.measure)))
        return
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, aiohttp {aiohttp.__version__}"
    kind = "real vLLM" if arguments.urls else f"stand-in, {arguments.rate:,.0f} tokens/s each"
    print(f"# python benchmarks/fleet_client.py · {machine}")
    print(f"{len(arguments.urls or []) or arguments.servers} servers ({kind}), {arguments.answers} answers a request")
    print("| answers |     tokens | wall s | tokens/s | client s | overhead | us/token | RSS before | peak RSS |")
    print("|--------:|-----------:|-------:|---------:|---------:|---------:|---------:|-----------:|---------:|")
    processes = []
    try:
        if not arguments.urls:
            # All answers of a sub-request advance together, so a server's rate is shared by what it may have at a time.
            seconds = arguments.concurrent / arguments.rate
            processes = [Process(token_seconds=seconds) for _ in range(arguments.servers)]
            urls = [process.url for process in processes]
        else:
            urls = arguments.urls
        for count in arguments.counts:
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", str(count), "--urls", *urls]
            row = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()[-1])
            print(
                f"| {count:7,} | {row['tokens']:10,} | {row['wall']:6.1f} | {row['tokens'] / row['wall']:8,.0f} | "
                f"{row['cpu']:8.2f} | {row['cpu'] / row['wall']:8.1%} | {row['cpu'] / row['tokens'] * 1e6:8.2f} | "
                f"{row['before'] / 1024:7.0f} MB | {row['peak'] / 1024:5.0f} MB |",
                flush=True,
            )
    finally:
        for process in processes:
            process.kill()


class Named:
    """A server by its address."""

    def __init__(self, url: str, api_key: str, is_real: bool) -> None:
        self.url, self.api_key, self._is_real = url, api_key, is_real

    def label(self, version: int) -> None:
        if self._is_real:  # the others have the label 0 from the start
            headers = {"Authorization": f"Bearer {self.api_key}"}
            url = f"{self.url}/update_weight_version"
            httpx.post(url, json={"new_version": str(version)}, headers=headers, timeout=30, trust_env=False).raise_for_status()


def measure(arguments: argparse.Namespace, count: int) -> dict[str, float]:
    servers = [Named(url, arguments.key, is_real=arguments.model is not None) for url in arguments.urls]
    rng = np.random.default_rng(0)
    vocabulary = (
        VOCABULARY if arguments.model is None else json.loads((arguments.model / "config.json").read_text())["vocab_size"]
    )
    step = 1 if arguments.answers > 1 else 2
    requests = [
        Request(
            i,
            rng.integers(2, vocabulary, arguments.prompt_tokens).astype(np.int32),
            tuple(range(7919 * i, 7919 * i + step * arguments.answers, step)),
            expected_tokens=arguments.max_tokens // 2,
        )
        for i in range(count // arguments.answers)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or Path(scratch)
        if arguments.model is None:
            config = Qwen2Config(
                vocab_size=VOCABULARY, hidden_size=8, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1
            )
            config.architectures = ["Qwen2ForCausalLM"]
            config.save_pretrained(folder)
        tokens_per_request = arguments.prompt_tokens + arguments.answers * (arguments.max_tokens // 2)
        budget = max(1, arguments.concurrent // arguments.answers) * tokens_per_request
        engine = FleetEngine(StaticFleet(servers), folder, budget_tokens=budget)
    engine.load([], 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu, tokens, num_answers = time.perf_counter(), time.process_time(), 0, 0
    for completion in engine.generate(requests, sampling(arguments.max_tokens)):
        tokens += len(completion.tokens)
        num_answers += 1
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert num_answers == len(requests) * arguments.answers
    engine.close()
    return {
        "tokens": tokens,
        "wall": wall,
        "cpu": cpu,
        "before": before,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


if __name__ == "__main__":
    main()
