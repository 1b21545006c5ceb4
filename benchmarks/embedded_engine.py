"""How fast the embedded engine is, as a ratio to transformers' own `generate` in the same run.

A random Qwen2 of the quickstart's shape answers as many prompts as a round of the quickstart has, of their length, several
answers each, in three ways:

  generate   `model.generate` of transformers at each of --generate-batch-sizes, one thread, without log-probs; the best counts
  one        the embedded engine in this process, one thread, with the log-prob of every token
  all        the embedded engine with a worker process a core, one thread each, with log-probs

in two workloads: `fixed`, where every answer has exactly --answer-tokens tokens, and `varied`, where stop tokens end answers
at random (geometric lengths, at most --answer-tokens), as in training. Tokens/s count the tokens of answers alone, up to and
including the stop token. The machine's noise hits all alike: the ways take turns within each repeat, the table shows medians
over the repeats, and a ratio is the median of the ratios within a repeat.

Goals: one / generate >= 1.2, all / one >= 1.8 on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # read when torch is imported

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from nft_megatron.base.records import Request, Sampling
from nft_megatron.rollout.embedded import EmbeddedEngine
from nft_megatron.weights import read_shape


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hidden", type=int, default=96, help="hidden size (%(default)s)")
    add("--intermediate", type=int, default=288, help="MLP size (%(default)s)")
    add("--layers", type=int, default=2, help="layers (%(default)s)")
    add("--heads", type=int, default=4, help="query heads (%(default)s)")
    add("--kv-heads", type=int, default=2, help="key-value heads (%(default)s)")
    add("--vocab", type=int, default=320, help="vocabulary (%(default)s)")
    add("--questions", type=int, default=48, help="prompts (%(default)s)")
    add("--answers", type=int, default=16, help="answers to each prompt (%(default)s)")
    add("--prompt-tokens", type=int, default=20, help="length of every prompt (%(default)s)")
    add("--answer-tokens", type=int, default=48, help="longest answer (%(default)s)")
    add("--mean-tokens", type=float, default=27.0, help="of an answer in the varied workload, before the cut (%(default)s)")
    add("--generate-batch-sizes", type=int, nargs="+", default=[64, 128, 256], help="tried for generate (%(default)s)")
    add("--batch-size", type=int, default=128, help="of the embedded engine, per process (%(default)s)")
    add("--processes", type=int, default=os.cpu_count(), help="for `all` (one a core: %(default)s)")
    add("--repeats", type=int, default=5, help="rounds in which all ways take turns (%(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=arguments.hidden,
            intermediate_size=arguments.intermediate,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.heads,
            num_key_value_heads=arguments.kv_heads,
            vocab_size=arguments.vocab,
            max_position_embeddings=arguments.prompt_tokens + arguments.answer_tokens,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, arguments.vocab, (arguments.questions, arguments.prompt_tokens)).astype(np.int32)
    # With its first, tiny weights the model draws tokens almost uniformly, so each stop token has a chance of 1 / vocab.
    stop_tokens = tuple(range(max(1, round(arguments.vocab / arguments.mean_tokens))))
    with engines(model, arguments) as (one, all_cores):
        ways: dict[str, Callable[[tuple[int, ...], int], int]] = {
            f"generate, batch {size}": generate_way(model, prompts, arguments, size) for size in arguments.generate_batch_sizes
        }
        ways["one"], ways["all"] = engine_way(one, prompts, arguments), engine_way(all_cores, prompts, arguments)
        for workload, stops in (("fixed", ()), ("varied", stop_tokens)):
            measure(workload, ways, stops, arguments)


@contextlib.contextmanager
def engines(model: Qwen2ForCausalLM, arguments: argparse.Namespace) -> Iterator[tuple[EmbeddedEngine, EmbeddedEngine]]:
    with tempfile.TemporaryDirectory() as folder:
        model.config.architectures = ["Qwen2ForCausalLM"]
        model.config.save_pretrained(folder)
        both = [
            EmbeddedEngine(Path(folder), read_shape(folder), num_processes=num_processes, batch_size=arguments.batch_size)
            for num_processes in (0, arguments.processes)
        ]
        try:
            fingerprints = {engine.load(model.named_parameters(), version=0) for engine in both}
            assert len(fingerprints) == 1
            yield both[0], both[1]
        finally:
            for engine in both:
                engine.close()


def generate_way(
    model: Qwen2ForCausalLM, prompts: np.ndarray, arguments: argparse.Namespace, batch_size: int
) -> Callable[[tuple[int, ...], int], int]:
    rows = torch.from_numpy(prompts).long().repeat_interleave(arguments.answers, dim=0)

    def run(stops: tuple[int, ...], repeat: int) -> int:
        torch.manual_seed(repeat)
        num_tokens = 0
        for batch in rows.split(batch_size):
            output = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=arguments.answer_tokens,
                do_sample=True,
                top_k=0,
                eos_token_id=list(stops) or None,
                pad_token_id=0,
            )[:, batch.shape[1] :]
            stopped = torch.isin(output, torch.tensor(stops, dtype=torch.int64))
            num_tokens += int((stopped.cumsum(dim=1) - stopped.long() == 0).sum())
        return num_tokens

    return run


def engine_way(
    engine: EmbeddedEngine, prompts: np.ndarray, arguments: argparse.Namespace
) -> Callable[[tuple[int, ...], int], int]:
    def run(stops: tuple[int, ...], repeat: int) -> int:
        requests = [
            Request(i, prompt, tuple((repeat * len(prompts) + i) * arguments.answers + k for k in range(arguments.answers)))
            for i, prompt in enumerate(prompts)
        ]
        sampling = Sampling(max_tokens=arguments.answer_tokens, stop_token_ids=stops)
        return sum(len(completion.logprobs) for completion in engine.generate(requests, sampling))

    return run


def measure(
    workload: str, ways: dict[str, Callable[[tuple[int, ...], int], int]], stops: tuple[int, ...], arguments: argparse.Namespace
) -> None:
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(arguments.repeats + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            num_tokens = run(stops, repeat)
            if repeat:  # the first round warms up
                speeds[name].append(num_tokens / (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    best = max((name for name in ways if name.startswith("generate")), key=medians.__getitem__)

    def ratio(name: str, reference: str) -> str:
        pairs = zip(speeds[name], speeds[reference], strict=True)
        return f"{statistics.median(a / b for a, b in pairs):.2f}"

    print(f"\n{workload}: {arguments.questions} x {arguments.answers} answers, medians of {arguments.repeats} repeats")
    print(f"| {'way':24} | tokens/s | slowest–fastest | / best generate | / one |")
    print(f"|{'-' * 26}|---------:|----------------:|----------------:|------:|")
    for name, values in speeds.items():
        spread = f"{min(values):,.0f}–{max(values):,.0f}"
        print(f"| {name:24} | {medians[name]:8,.0f} | {spread:>15} | {ratio(name, best):>15} | {ratio(name, 'one'):>5} |")
    print(f"goals: one / generate {ratio('one', best)} (>= 1.2), all / one {ratio('all', 'one')} (>= 1.8)", flush=True)


if __name__ == "__main__":
    main()
