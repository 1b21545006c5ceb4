"""``nft-megatron verify``: files of answers in, the same rows with verdicts out."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.errors import UserError
from nft_megatron.base.records import FinishReason, Label
from nft_megatron.base.untrusted import parse_json
from nft_megatron.config.sections import VerifyConfig
from nft_megatron.data.files import rows_of
from nft_megatron.data.gold_check import by_themselves, counts_of, refuse_unmatched, unmatched_golds
from nft_megatron.data.golds import GoldError, read_gold
from nft_megatron.observe.progress import open_progress
from nft_megatron.verify.modes import mode_of
from nft_megatron.verify.reasons import REASONS, reason_of
from nft_megatron.verify.reasons import verdict as unknown
from nft_megatron.verify.rules import rules_of
from nft_megatron.verify.service import Verifier

log = logging.getLogger(__name__)
Row = dict[str, Any]
LABELS: tuple[str, ...] = get_args(Label)
_GOLDS = ("gold", "ground_truth", "final_answer", "answer")
_ANSWERS = ("text", "response", "completion", "output", "answer")
_QUESTIONS = ("question", "problem", "prompt")
"""The usual names of fields, in the order in which they count."""
_LONG = ("prompt_tokens", "answer_tokens", "behaviour_logprobs")
"""Columns of a ledger that take most of its bytes and no grader reads."""


@dataclass(frozen=True)
class Fields:
    """The names of a file's fields: the whole answer, and the right one."""

    answer: str
    gold: str

    @classmethod
    def of(cls, row: Row, where: str, answer: str | None, gold: str | None) -> Fields:
        """``answer`` and ``gold`` where they are given, else the usual names; a ledger calls the answer ``answer``.

        Raises :class:`UserError` if ``row`` has none of them.

        >>> Fields.of({"answer": "so 4", "gold": "4", "label": "correct"}, "", None, None)
        Fields(answer='answer', gold='gold')
        >>> Fields.of({"response": "so 4", "answer": "4"}, "", None, None)
        Fields(answer='response', gold='answer')
        """
        gold = gold or next((name for name in _GOLDS if name in row and name != answer), None)
        answer = answer or next((name for name in _ANSWERS if name in row and name != gold), None)
        for option, field, names in (("--answer-field", answer, _ANSWERS), ("--gold-field", gold, _GOLDS)):
            if field is None or field not in row:
                what = f"field {field!r}" if field else f"field of the usual names ({', '.join(names)})"
                problem = f"has no {what} (it has {', '.join(row) or 'none'})"
                raise UserError("FILE", where, problem, f"name the right one with {option}")
        assert answer is not None and gold is not None
        return cls(answer, gold)


def verify_file(
    *paths: Path,
    answer_field: str | None = None,
    gold_field: str | None = None,
    mode: str = "strict",
    out: Path | None = None,
    workers: int | None = None,
) -> None:
    """Grade the answers in files of any kind that training data may have and print a table of reasons.

    ``out`` gets each row unchanged plus ``verdict`` and ``reason`` (fields of that name are replaced), and with several files
    also ``file``. A row whose ``finish_reason`` is "length" or "abort", as in a ledger, is judged so. ``workers``: grader
    processes, by default one per core. Without ``answer_field`` or ``gold_field`` each file's first row decides; see
    :meth:`Fields.of`. Where rows have an earlier verdict, as in a ledger, changes are counted too. A row whose gold is not even
    matched by itself is unknown.

    Raises :class:`UserError` with file and line if a line is not a row, lacks a field, or has no text there; and at the end,
    with everything written, if more than 1 % of the golds are not matched by themselves: the shares say nothing then.
    """
    mode_of(mode, "--mode")
    settings = VerifyConfig.of_grader(mode, workers=workers or os.cpu_count() or 1)
    num_rows = sum(map(_count, paths))

    def golds() -> Iterator[tuple[str, str]]:
        rows = _rows_of_all(paths, answer_field, gold_field, whole=False)
        return ((_answer_of(row, where, fields)[1], where) for _, where, row, fields in rows)

    rows, to_grade = itertools.tee(_rows_of_all(paths, answer_field, gold_field, whole=out is not None))
    counts: Counter[str] = Counter()
    changes: Counter[str] = Counter()
    earlier: dict[str, None] = {}
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(_open_out(out)) if out else None
        progress = stack.enter_context(open_progress(1))
        verifier = stack.enter_context(Verifier(settings))
        verifier.check()
        respelled = unmatched_golds((gold for gold, _ in golds()), verifier)
        unmatched = by_themselves(respelled)
        progress.phase("verify", total=num_rows)
        answers = ((*_answer_of(row, where, fields), _question_of(row)) for _, where, row, fields in to_grade)
        for (path, where, row, fields), graded in zip(rows, verifier.verify_many(answers), strict=True):
            gold = _answer_of(row, where, fields)[1] if unmatched else ""
            is_matched = gold not in unmatched
            verdict = graded if is_matched else unknown("unmatched gold", graded.verifier, detail=unmatched[gold].kind)
            counts[reason_of(verdict)] += 1
            if row.get("label") in LABELS and "verifier" in row:
                earlier[str(row["verifier"])] = None
                changes[f"{row['label']} → {verdict.label}"] += row["label"] != verdict.label
            if sink:
                of_file = {"file": str(path)} if len(paths) > 1 else {}
                judged = {**row, **of_file, "verdict": verdict.label, "reason": verdict.reason}
                sink.write(json.dumps(judged, default=str) + "\n")
            progress.advance()
    print(table_of(counts))
    if earlier:
        kinds = ", ".join(f"{change}: {count:,}" for change, count in changes.most_common() if count)
        print(
            f"{changes.total():,} verdicts differ from the recorded ones by {', '.join(earlier)}; these are by {rules_of(mode)}"
            + (f" ({kinds})" if kinds else "")
        )
    if num_respelled := len(respelled) - len(unmatched):
        log.warning(
            "%d golds are not matched in every spelling under --mode %s, so right answers may count as wrong (%s)",
            num_respelled,
            mode,
            counts_of(reason for reason in respelled.values() if reason.spelling),
        )
    if out:
        print(out)
    remedy = "name the column of the final answers with --gold-field, correct them, or choose another --mode"
    refuse_unmatched(golds() if unmatched else (), unmatched, "FILE", f"--mode {mode}", remedy)


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


def _answer_of(row: Row, where: str, fields: Fields) -> tuple[str, str, FinishReason]:
    answer_field, gold_field = fields.answer, fields.gold
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


def _question_of(row: Row) -> str:
    """For a user's verifier; empty where the row has no text of a usual name."""
    return next((row[name] for name in _QUESTIONS if isinstance(row.get(name), str)), "")


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


def _rows_of_all(
    paths: Sequence[Path], answer_field: str | None, gold_field: str | None, *, whole: bool
) -> Iterator[tuple[Path, str, Row, Fields]]:
    """Every row with its file, its place for messages, and the fields of its file. ``whole``: with all columns."""
    for path in paths:
        fields: Fields | None = None
        for where, row in _rows_of(path, whole=whole):
            fields = fields or Fields.of(row, where, answer_field, gold_field)
            yield path, where, row, fields


def _rows_of(path: Path, *, whole: bool) -> Iterator[tuple[str, Row]]:
    """Each row with its place for messages: lines are numbered from 1, Parquet rows from 0."""
    if path.suffix == ".parquet":
        with _parquet(path) as parquet:
            columns = [name for name in parquet.schema_arrow.names if whole or name not in _LONG]
            batches = (batch.to_pylist() for batch in parquet.iter_batches(batch_size=256, columns=columns))
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
        row = parse_json(line)
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
