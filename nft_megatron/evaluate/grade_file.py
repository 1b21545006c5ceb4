"""``nft-megatron verify``: a file of answers in, the same rows with verdicts out."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.errors import UserError
from nft_megatron.base.records import FinishReason
from nft_megatron.config.sections import VerifyConfig
from nft_megatron.data.files import rows_of
from nft_megatron.data.golds import GoldError, read_gold
from nft_megatron.observe.progress import open_progress
from nft_megatron.verify.modes import MODES
from nft_megatron.verify.reasons import REASONS, reason_of
from nft_megatron.verify.service import Verifier

Row = dict[str, Any]


def verify_file(
    path: Path, *, answer_field: str, gold_field: str, mode: str, out: Path | None = None, workers: int | None = None
) -> None:
    """Grade the answers in a file of any kind that training data may have and print a table of reasons.

    ``out`` gets each row unchanged plus ``verdict`` and ``reason`` (fields of that name are replaced). A row with a
    ``finish_reason`` of "length" or "abort", as in a ledger, is judged accordingly. ``workers``: grader processes, by default
    one per core.

    Raises :class:`UserError` with file and line if a line is not a row, lacks a field, or has no text there.
    """
    if mode not in MODES:
        raise UserError("--mode", mode, "no such mode", f"use one of {', '.join(MODES)}")
    settings = VerifyConfig.model_validate({"mode": mode, "workers": workers or os.cpu_count() or 1})
    num_rows = _count(path)
    rows, to_grade = itertools.tee(_rows_of(path))
    counts: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(_open_out(out)) if out else None
        progress = stack.enter_context(open_progress(1))
        verifier = stack.enter_context(Verifier(settings))
        progress.phase("verify", total=num_rows)
        answers = (_answer_of(row, where, answer_field, gold_field) for where, row in to_grade)
        for (_, row), verdict in zip(rows, verifier.verify_many(answers), strict=True):
            counts[reason_of(verdict)] += 1
            if sink:
                sink.write(json.dumps({**row, "verdict": verdict.label, "reason": verdict.reason}, default=str) + "\n")
            progress.advance()
    print(table_of(counts))
    if out:
        print(out)


def table_of(counts: Counter[str]) -> str:
    """The reasons that occur, with their counts and shares.

    >>> print(table_of(Counter({"exact": 3, "truncated": 1})))
    verdict   reason                 answers    share
    correct   exact                        3   75.00%
    wrong     truncated                    1   25.00%
    correct 75.00%, wrong 25.00%, unknown 0.00% of 4 answers
    """
    lines = [f"{'verdict':9} {'reason':20} {'answers':>9} {'share':>8}"]
    labels: Counter[str] = Counter()
    for reason, (label, _) in REASONS.items():
        labels[label] += counts[reason]
        if counts[reason]:
            lines.append(f"{label:9} {reason:20} {counts[reason]:9,} {counts[reason] / counts.total():8.2%}")
    shares = ", ".join(f"{label} {labels[label] / max(counts.total(), 1):.2%}" for label in ("correct", "wrong", "unknown"))
    return "\n".join([*lines, f"{shares} of {counts.total():,} answers"])


def _answer_of(row: Row, where: str, answer_field: str, gold_field: str) -> tuple[str, str, FinishReason]:
    for option, field in (("--answer-field", answer_field), ("--gold-field", gold_field)):
        if field not in row:
            raise UserError(
                "FILE",
                where,
                f"has no field {field!r} (it has {', '.join(row) or 'none'})",
                f"name the right one with {option}",
            )
    text, gold = row[answer_field], row[gold_field]
    if not isinstance(text, str):
        problem = f"{answer_field!r} is not text but {type(text).__name__}"
        raise UserError("FILE", where, problem, "put the model's whole answer there")
    try:
        gold = read_gold(gold)
    except GoldError as error:
        raise UserError("FILE", where, f"the gold in {gold_field!r} {error}", "put the correct answer there") from error
    if not gold:
        raise UserError("FILE", where, f"the gold in {gold_field!r} is empty", "put the correct answer there")
    reason = row.get("finish_reason")
    return text, gold, reason if reason in ("length", "abort") else "stop"


@contextlib.contextmanager
def _open_out(out: Path) -> Iterator[TextIO]:
    with atomic_file(out) as temporary, temporary.open("w", encoding="utf-8") as sink:
        yield sink


def _count(path: Path) -> int:
    if not path.is_file():
        raise UserError("FILE", path, "no such file", "check the path")
    if path.suffix == ".parquet":
        with _parquet(path) as parquet:
            return parquet.metadata.num_rows
    if path.suffix == ".jsonl":
        with path.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    return sum(1 for _ in rows_of(path, "FILE", ()))


def _rows_of(path: Path) -> Iterator[tuple[str, Row]]:
    """Each row with its place for messages: lines are numbered from 1, Parquet rows from 0."""
    if path.suffix == ".parquet":
        with _parquet(path) as parquet:
            batches = (batch.to_pylist() for batch in parquet.iter_batches(batch_size=256))
            for number, row in enumerate(itertools.chain.from_iterable(batches)):
                yield f"{path}, row {number}", row
        return
    if path.suffix != ".jsonl":
        for number, row in enumerate(rows_of(path, "FILE", ())):
            yield f"{path}, row {number}", row
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}, line {number}", _json_object(line, f"{path}, line {number}")


def _json_object(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError("FILE", where, f"is not JSON: {error}", "correct that line") from error
    if not isinstance(row, dict):
        raise UserError("FILE", where, "is not a JSON object", "write one {…} per line")
    return row


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            "FILE", path, f"is not readable as Parquet: {str(error).splitlines()[0]}", "check that it is complete"
        ) from error
