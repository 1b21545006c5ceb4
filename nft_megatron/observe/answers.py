"""A sample of a run's recorded answers, small enough for one page.

The ledgers of a large run take gigabytes; a page must open at once. Hence evenly spread steps, whole groups drawn at random
within a step (r̂ is about all K answers of a question), the middle of very long texts cut, and a cap on the total.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nft_megatron.base.errors import UserError
from nft_megatron.data.ledger import read_index
from nft_megatron.observe.embed import json_for_script

MAX_STEPS = 40
MAX_GROUPS_PER_STEP = 12
MAX_CHARACTERS = 12_000
MAX_BYTES = 5_000_000

_TEXT_COLUMNS = (
    "group_id",
    "question_id",
    "fate",
    "correct_rate",
    "question",
    "gold",
    "answer",
    "behaviour_logprobs",
    "answer_length",
    "label",
    "reason",
    "finish_reason",
    "weight_version",
)


@dataclass(frozen=True)
class AnswerSample:
    """``groups``: JSON-ready dicts in order of step, each with its ``answers``. ``note``: what the page omits."""

    groups: list[dict[str, Any]]
    note: str


def sample_answers(run_dir: Path | str, max_bytes: int = MAX_BYTES) -> AnswerSample:
    """Groups of the run's ledgers, at most ``max_bytes`` of JSON in all. The same ledgers always give the same sample.

    Raises:
        UserError: a ledger is damaged.
    """
    ledger = Path(run_dir) / "ledger"
    paths = sorted(ledger.glob("step_*.parquet")) or sorted((ledger / "rounds").glob("step_*.parquet"))  # of an unfinished step
    if not paths:
        return AnswerSample([], "This run folder has no recorded answers.")
    by_step = [_draw_groups(path) for path in _spread(paths, MAX_STEPS)]
    kept: list[dict[str, Any]] = []
    num_bytes = 0
    # The first group of every step, then the second of every step, …: a page that fills up still shows the whole run.
    for rank in range(MAX_GROUPS_PER_STEP):
        for groups in by_step:
            if rank < len(groups):
                size = len(json_for_script(groups[rank]).encode())
                if num_bytes + size <= max_bytes:
                    num_bytes += size
                    kept.append(groups[rank])
    kept.sort(key=lambda group: group["step"])
    num_answers, num_steps = sum(len(group["answers"]) for group in kept), len({group["step"] for group in kept})
    num_recorded = len({_step_of(path) for path in paths})
    note = (
        f"A random sample of the ledger: {len(kept)} questions with {num_answers} answers from {num_steps} of {num_recorded} "
        f"rollout steps. The page shows at most {MAX_STEPS} steps, {MAX_GROUPS_PER_STEP} questions per step and "
        f"{max_bytes / 1e6:g} MB; texts longer than {MAX_CHARACTERS:,} characters lose their middle. The full record is in "
        f"{Path(run_dir).resolve().name}/ledger."
    )
    return AnswerSample(kept, note)


def _spread(items: Sequence[Path], count: int) -> list[Path]:
    """At most ``count`` of ``items`` at even distances, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _step_of(path: Path) -> int:
    return int(path.stem.split("_")[1])


def _draw_groups(path: Path) -> list[dict[str, Any]]:
    """Up to ``MAX_GROUPS_PER_STEP`` groups of one ledger in random order, as the page shows them."""
    step = _step_of(path)
    group_ids = sorted(set(read_index(path).group_id.tolist()))
    drawn = random.Random(step).sample(group_ids, min(len(group_ids), MAX_GROUPS_PER_STEP))
    try:
        # The filter on group ids spares the row groups that hold none of them.
        table = pq.read_table(
            path, columns=list(_TEXT_COLUMNS), filters=[("group_id", "in", drawn)], page_checksum_verification=True
        )
        rows = groupby(table.to_pylist(), key=lambda row: row["group_id"])
    except (pa.ArrowException, OSError, ValueError) as error:  # text that is no UTF-8
        raise UserError("ledger", path, f"damaged: {error}", "restore it, or delete it and write the report again") from error
    groups = {group_id: _show_group(step, list(members)) for group_id, members in rows}
    return [groups[group_id] for group_id in drawn]


def _show_group(step: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = rows[0]
    return {
        "step": step,
        "question_id": first["question_id"],
        "question": _cut(first["question"])[0],
        "gold": first["gold"],
        "fate": first["fate"],
        "correct_rate": first["correct_rate"],
        "answers": [_show_answer(row) for row in rows],
    }


def _show_answer(row: dict[str, Any]) -> dict[str, Any]:
    text, num_left_out = _cut(row["answer"])
    logprobs = row["behaviour_logprobs"]
    return {
        "text": text,
        "cut": num_left_out,
        "label": row["label"],
        "reason": row["reason"],
        "finish_reason": row["finish_reason"],
        "num_tokens": row["answer_length"],
        "mean_logprob": round(float(np.mean(logprobs)), 4) if logprobs else None,
        "weight_version": row["weight_version"],
    }


def _cut(text: str) -> tuple[str, int]:
    """``text`` with what exceeds ``MAX_CHARACTERS`` taken from its middle, and how many characters that were."""
    num_left_out = len(text) - MAX_CHARACTERS
    if num_left_out <= 0:
        return text, 0
    head = MAX_CHARACTERS // 2
    return f"{text[:head]}\n[…]\n{text[head + num_left_out :]}", num_left_out
