"""Bytes that each rank reads of a step's ledger, beside its share of them.

A ledger of --answers answers, --mean tokens long on average, is written; then --ranks data-parallel ranks read what they train
on, one after the other in this process:

  own rows   every rank by itself the rows that it trains on, which lie all over the file
  shared     every rank the row groups that are dealt out to it, as training reads: the rows then travel between ranks

Columns: bytes that a rank reads, by the kernel's count (/proc/self/io), everything included (the file's directory, the index,
the tokens), mean and most over ranks; the most, / the share of a rank, which is the bytes of the token columns / ranks, and as
a part of the token columns; seconds of CPU time.

Goal: read / share at most 1.1 for 8,192 answers of 5,000 tokens and 16 ranks.

    python benchmarks/ledger_rows.py
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nft_megatron.algorithms import build_algorithm
from nft_megatron.base.records import Answer, Completion, Group, Prompt, Verdict
from nft_megatron.batching.batch import StepPlan, plan_step
from nft_megatron.batching.minibatches import BatchingRules
from nft_megatron.data.ledger import OpenLedger, open_ledger, write_ledger

GROUP_SIZE, LONGEST, VOCAB = 16, 16_000, 151_000
GOAL = 1.1
TOKEN_COLUMNS = ("prompt_tokens", "answer_tokens", "behaviour_logprobs")


@dataclass(frozen=True)
class Reading:
    """What one rank read: bytes, CPU seconds, and the rows."""

    bytes: int
    seconds: float
    rows: np.ndarray


def write_step(path: Path, num_answers: int, mean: float) -> None:
    """Groups of answers of log-normal lengths; token ids by Zipf's law, as texts have them, and log-probs of all magnitudes."""
    rng = np.random.default_rng(0)
    groups = []
    for number in range(num_answers // GROUP_SIZE):
        prompt = Prompt(f"dapo/{number}", f"Question {number}?", "1", rng.zipf(1.3, 150).clip(1, VOCAB).astype(np.int32))
        answers = []
        for index in range(GROUP_SIZE):
            length = int(np.clip(rng.lognormal(np.log(mean) - 0.18, 0.6), 16, LONGEST))
            tokens = (rng.zipf(1.3, length) % VOCAB).astype(np.int32)
            logprobs = -rng.exponential(0.4, length).astype(np.float32)
            verdict = Verdict("correct" if index % 2 else "wrong", "made up", "benchmark")
            answers.append(Answer(Completion(number, index, tokens, logprobs, "stop", 0, 0.0), "x" * (4 * length), verdict))
        groups.append(Group(number, 1, prompt, tuple(answers)))
    write_ledger(path, groups, fates=["train"] * len(groups), meta={})


def num_read() -> int:
    """Bytes that this process has read so far, from disk or from the kernel's cache."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def read(path: Path, rules: BatchingRules, rows_of: Callable[[OpenLedger, StepPlan], np.ndarray]) -> Reading:
    before, start = num_read(), time.process_time()
    with open_ledger(path) as opened:
        plan = plan_step(opened.index(), 1, build_algorithm("nft"), rules)
        rows = rows_of(opened, plan)
        opened.tokens(rows)
    return Reading(num_read() - before, time.process_time() - start, rows)


def own_rows(rank: int) -> Callable[[OpenLedger, StepPlan], np.ndarray]:
    return lambda opened, plan: plan.index.row[plan.positions_of(rank)]


def dealt_out(rank: int, num_ranks: int) -> Callable[[OpenLedger, StepPlan], np.ndarray]:
    def rows(opened: OpenLedger, plan: StepPlan) -> np.ndarray:
        trained = np.sort(np.concatenate([own_rows(rank)(opened, plan) for rank in range(num_ranks)]))
        return trained[opened.share_out(trained, num_ranks) == rank]

    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=8192)
    parser.add_argument("--mean", type=float, default=5000.0, help="tokens of an answer")
    parser.add_argument("--ranks", type=int, default=16)
    options = parser.parse_args()
    rules = BatchingRules(
        num_updates=16,
        num_ranks=options.ranks,
        token_budget=16_384,
        hidden_size=5120,
        denominator="tokens",
        seed=0,
        tensor_size=1,
        context_size=1,
        count_multiple=1,
        pad_to_budget=False,
    )
    print(f"# python benchmarks/ledger_rows.py · {platform.machine()}, pyarrow {pa.__version__}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step_000001.parquet"
        write_step(path, options.answers, options.mean)
        metadata = pq.ParquetFile(path).metadata
        columns = [metadata.row_group(i).column(j) for i in range(metadata.num_row_groups) for j in range(metadata.num_columns)]
        tokens = sum(c.total_compressed_size for c in columns if c.path_in_schema.split(".")[0] in TOKEN_COLUMNS)
        directory = metadata.serialized_size
        share = tokens / options.ranks
        print(
            f"{options.answers:,} answers, mean {options.mean:,.0f} tokens: {path.stat().st_size / 1e6:,.1f} MB, "
            f"{metadata.num_row_groups} row groups; token columns {tokens / 1e6:,.1f} MB, directory {directory / 1e6:.2f} MB; "
            f"{options.ranks} ranks, share {share / 1e6:.2f} MB"
        )
        ways = {
            "own rows": [read(path, rules, own_rows(rank)) for rank in range(options.ranks)],
            "shared": [read(path, rules, dealt_out(rank, options.ranks)) for rank in range(options.ranks)],
        }
    assert sorted(np.concatenate([each.rows for each in ways["shared"]])) == list(range(options.answers)), "each row once"
    print("| way      | MB read, mean |   max | max / share | of the token columns | CPU s, max |")
    print("|----------|--------------:|------:|------------:|---------------------:|-----------:|")
    for name, readings in ways.items():
        most, mean = max(each.bytes for each in readings), np.mean([each.bytes for each in readings])
        numbers = f"{mean / 1e6:13.2f} | {most / 1e6:5.1f} | {most / share:11.2f} | {most / tokens:20.1%}"
        print(f"| {name:8} | {numbers} | {max(each.seconds for each in readings):10.2f} |")
    kept = [len(np.intersect1d(a.rows, b.rows)) for a, b in zip(*ways.values(), strict=True)]
    print(f"of its {options.answers / options.ranks:,.0f} answers a rank reads {np.mean(kept):.0f} itself; the others arrive")
    worst = max(each.bytes for each in ways["shared"]) / share
    print(f"goal: read / share <= {GOAL}: {worst:.3f}, {'met' if worst <= GOAL else 'missed'}")


if __name__ == "__main__":
    main()
