"""The ledger: the rollouts of one step as one Parquet file, one row per answer, the answers of a group together.

A step trains on it, a resumed run reads it instead of generating again, and the report shows it. It is written completely or
not at all; every page has a checksum, so that a damaged file is refused. Row groups are small, so that readers share a file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Answer, AnswerTokens, Completion, Group, Prompt, Verdict
from nft_megatron.base.untrusted import parse_json

LEDGER_VERSION = 1
Fate = Literal["train", "surplus", "sampled"]

_VERSION_KEY, _META_KEY = b"nft_megatron.ledger_version", b"nft_megatron.meta"
_ROW_GROUP_TOKENS, _ROW_GROUP_ROWS, _READERS = 2**18, 256, 16

SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("group_id", pa.int64()),
        ("question_id", pa.string()),
        ("fate", pa.string()),
        ("correct_rate", pa.float64()),  # r̂ of the group; null when nothing was judged
        ("num_judged", pa.int32()),
        ("question", pa.string()),
        ("gold", pa.string()),
        ("answer", pa.string()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("answer_tokens", pa.list_(pa.int32())),
        ("behaviour_logprobs", pa.list_(pa.float32())),
        ("prompt_length", pa.int32()),
        ("answer_length", pa.int32()),
        ("label", pa.string()),
        ("reason", pa.string()),
        ("verifier", pa.string()),
        ("verify_seconds", pa.float64()),
        ("finish_reason", pa.string()),
        ("weight_version", pa.int64()),
        ("request_id", pa.int64()),
        ("answer_index", pa.int32()),
        ("generate_seconds", pa.float64()),
    ]
)
_TOKEN_COLUMNS = ("prompt_tokens", "answer_tokens", "behaviour_logprobs")


@dataclass(frozen=True, eq=False)
class LedgerIndex:
    """Answers of a ledger without their texts and tokens: NumPy arrays with one entry per answer, in file order.

    ``row`` is the answer's row in the file. ``correct_rate`` is NaN if no answer of the group was judged. Lengths are
    in tokens.

    >>> fields = {name: np.array([3, 4, 4]) for name in LedgerIndex.__dataclass_fields__}
    >>> index = LedgerIndex(**fields | {"row": np.arange(3)})
    >>> index.take(np.flatnonzero(index.group_id == 4)).row.tolist()
    [1, 2]
    """

    row: np.ndarray
    step: np.ndarray
    group_id: np.ndarray
    question_id: np.ndarray
    fate: np.ndarray
    label: np.ndarray
    is_correct: np.ndarray
    correct_rate: np.ndarray
    num_judged: np.ndarray
    prompt_length: np.ndarray
    answer_length: np.ndarray
    finish_reason: np.ndarray
    weight_version: np.ndarray

    def take(self, positions: np.ndarray) -> LedgerIndex:
        """The answers at ``positions``, which keep their ``row``."""
        return LedgerIndex(**{name: values[positions] for name, values in vars(self).items()})


def write_ledger(path: Path, groups: Sequence[Group], *, fates: Sequence[Fate], meta: dict[str, Any]) -> None:
    """Write ``groups`` and the JSON-serialisable ``meta`` to ``path``, replacing it atomically.

    Raises :class:`ValueError` for an answer whose log-probs are not finite or not one per token: an engine fault must not be
    trained on.
    """
    assert len(fates) == len(groups), "one fate per group"
    assert len({group.group_id for group in groups}) == len(groups), "group ids are unique within a step"
    rows = [_row(group, answer, fate) for group, fate in zip(groups, fates, strict=True) for answer in group.answers]
    schema = SCHEMA.with_metadata({_VERSION_KEY: str(LEDGER_VERSION), _META_KEY: json.dumps(meta)})
    plain = set(_TOKEN_COLUMNS[1:]) | {"answer"}  # hardly anything repeats in these
    with atomic_file(Path(path)) as temporary:
        writer = pq.ParquetWriter(
            temporary,
            schema,
            compression="zstd",
            use_dictionary=[name for name in SCHEMA.names if name not in plain],
            write_statistics=["group_id"],  # every reader reads the directory, and those of all columns are half of it
            write_page_checksum=True,
        )
        with writer:
            for chunk in _row_groups(rows):
                writer.write_table(pa.Table.from_pylist(chunk, schema=schema), row_group_size=len(chunk))


def read_meta(path: Path) -> dict[str, Any]:
    """The ``meta`` written with the file."""
    with _open(path) as ledger:
        return parse_json(ledger.schema_arrow.metadata[_META_KEY])


def check_step(path: Path, step: int, oldest: int) -> None:
    """Refuse the file of another step, such as a copy under another name.

    ``oldest``: the first step whose groups ``step`` may train on; before ``step`` itself where steps are collected ahead.

    Raises:
        UserError: naming the step that the file was written for, or a row's.
    """
    with _open(path) as ledger:
        written_for = json.loads(ledger.schema_arrow.metadata[_META_KEY]).get("step", step)
        steps = ledger.read(columns=["step"])["step"].unique().to_pylist()
    others = [written_for] if written_for != step else [each for each in steps if each is None or not oldest <= each <= step]
    if others:
        problem = f"holds the answers of step {others[0]}, not of step {step}"
        raise UserError("ledger", path, problem, "restore the file of that name, or delete it to collect its step anew")


def read_verifiers(path: Path) -> list[str]:
    """The verifiers that judged the answers in the file, each once, in order: versions of rules, as in a verdict."""
    with _open(path) as ledger:
        return list(dict.fromkeys(ledger.read(columns=["verifier"])["verifier"].to_pylist()))


def read_groups(path: Path) -> list[tuple[Group, Fate]]:
    """All groups with their fates, as they were written."""
    with _open(path) as ledger:
        rows = [
            {**row, **tokens._asdict()}
            for i in range(ledger.num_row_groups)
            for table in [ledger.read_row_group(i)]
            for row, tokens in zip(table.drop_columns(list(_TOKEN_COLUMNS)).to_pylist(), _tokens(table), strict=True)
        ]
        return [_group(list(members)) for _, members in groupby(rows, key=lambda row: row["group_id"])]


def read_index(path: Path) -> LedgerIndex:
    """The index of all rows, without reading texts and tokens."""
    with open_ledger(path) as ledger:
        return ledger.index()


@contextlib.contextmanager
def open_ledger(path: Path) -> Iterator[OpenLedger]:
    """The ledger for several reads, which read the directory at the file's end once.

    Raises:
        UserError: the file is missing, no ledger or damaged; also where a read in the block finds that.
    """
    with _open(path) as file:
        yield OpenLedger(file)


class OpenLedger:
    """See :func:`open_ledger`."""

    def __init__(self, file: pq.ParquetFile) -> None:
        self._file = file
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def index(self) -> LedgerIndex:
        """The index of all rows, without reading texts and tokens."""
        columns = [name for name in LedgerIndex.__dataclass_fields__ if name not in ("row", "is_correct")]
        table = self._file.read(columns=columns)
        arrays = {name: table[name].to_numpy() for name in columns}
        return LedgerIndex(row=np.arange(table.num_rows), is_correct=arrays["label"] == "correct", **arrays)

    def tokens(self, rows: Sequence[int] | np.ndarray) -> list[AnswerTokens]:
        """The tokens of ``rows``, in that order. Only the row groups that hold them are read."""
        wanted, starts = np.asarray(rows, dtype=np.int64), self._starts
        found: dict[int, AnswerTokens] = {}
        for i in np.unique(self._row_groups_of(wanted)):
            inside = np.unique(wanted[(wanted >= starts[i]) & (wanted < starts[i + 1])])
            table = self._file.read_row_group(int(i), columns=list(_TOKEN_COLUMNS)).take(inside - starts[i])
            found.update(zip(inside.tolist(), _tokens(table), strict=True))
        return [found[row] for row in wanted.tolist()]

    def share_out(self, rows: np.ndarray, num_readers: int) -> np.ndarray:
        """Which of ``num_readers`` reads each of ``rows``: consecutive row groups, about as many bytes of tokens for each."""
        row_groups = self._row_groups_of(rows)
        sizes = np.zeros(self._file.num_row_groups)
        for i in np.unique(row_groups).tolist():
            columns = [self._file.metadata.row_group(i).column(j) for j in self._token_columns]
            sizes[i] = sum(column.total_compressed_size for column in columns)
        middles = np.cumsum(sizes) - sizes / 2
        return (middles / max(sizes.sum(), 1) * num_readers).astype(np.int64)[row_groups]

    def _row_groups_of(self, rows: np.ndarray) -> np.ndarray:
        assert rows.size == 0 or 0 <= rows.min() <= rows.max() < self._starts[-1], "rows of this ledger"
        return np.searchsorted(self._starts, rows, side="right") - 1

    @property
    def _token_columns(self) -> list[int]:
        """Their numbers among the columns of the file."""
        schema = self._file.schema
        return [j for j in range(len(schema)) if schema.column(j).path.split(".")[0] in _TOKEN_COLUMNS]


@contextlib.contextmanager
def _open(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a file and check that it is a ledger; damage found while reading becomes a :class:`UserError`."""
    if not Path(path).exists():
        raise UserError("ledger", path, "no such file", "check the step; a step has a ledger once its answers are collected")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as ledger:
            metadata = ledger.schema_arrow.metadata or {}
            if _VERSION_KEY not in metadata:
                raise UserError("ledger", path, "is Parquet but not a ledger", "name a file that nft_megatron wrote")
            if int(metadata[_VERSION_KEY]) > LEDGER_VERSION:
                version = metadata[_VERSION_KEY].decode()
                problem = f"has format {version}; this version reads up to {LEDGER_VERSION}"
                raise UserError("ledger", path, problem, "use the version of nft_megatron that wrote it, or a newer one")
            yield ledger
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:  # text that is no UTF-8, JSON, columns
        problem = f"is damaged: {(str(error) or type(error).__name__).splitlines()[0]}"
        raise UserError("ledger", path, problem, "delete it and run again to collect its step anew") from error


def _row(group: Group, answer: Answer, fate: Fate) -> dict[str, Any]:
    completion, prompt, verdict = answer.completion, group.prompt, answer.verdict
    if completion.logprobs.shape != completion.tokens.shape or not np.isfinite(completion.logprobs).all():
        raise ValueError(
            f"answer {completion.index} to question {prompt.question_id!r}: {completion.tokens.size} tokens with "
            f"{completion.logprobs.size} log-probs, {np.count_nonzero(~np.isfinite(completion.logprobs))} of them not finite"
        )
    return {
        "step": group.step,
        "group_id": group.group_id,
        "question_id": prompt.question_id,
        "fate": fate,
        "correct_rate": group.correct_rate if group.num_judged else None,
        "num_judged": group.num_judged,
        "question": prompt.question,
        "gold": prompt.gold,
        "answer": answer.text,
        "prompt_tokens": prompt.tokens,
        "answer_tokens": completion.tokens,
        "behaviour_logprobs": completion.logprobs,
        "prompt_length": len(prompt.tokens),
        "answer_length": len(completion.tokens),
        "label": verdict.label,
        "reason": verdict.reason,
        "verifier": verdict.verifier,
        "verify_seconds": verdict.seconds,
        "finish_reason": completion.finish_reason,
        "weight_version": completion.weight_version,
        "request_id": completion.request_id,
        "answer_index": completion.index,
        "generate_seconds": completion.seconds,
    }


def _row_groups(rows: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Split ``rows`` into parts of about equally many tokens and at most the rows of a row group.

    Unless one part suffices, there are a multiple of 16 of them, so that 2, 4, 8 or 16 readers get equally many. The limit of
    tokens may be exceeded by half an answer.
    """
    lengths = np.array([row["prompt_length"] + row["answer_length"] for row in rows])
    total = int(lengths.sum())
    count = -(-total // _ROW_GROUP_TOKENS)
    if count > 1:
        count = -(-count // _READERS) * _READERS
    middles = np.cumsum(lengths) - lengths / 2
    parts = np.minimum(middles * count // max(total, 1), count - 1)
    for _, members in groupby(zip(parts.tolist(), rows, strict=True), key=lambda pair: pair[0]):
        chunk = [row for _, row in members]
        for start in range(0, len(chunk), _ROW_GROUP_ROWS):
            yield chunk[start : start + _ROW_GROUP_ROWS]


def _tokens(table: pa.Table) -> list[AnswerTokens]:
    """The token columns row by row, copied so that they do not keep the whole table alive."""
    columns = [[row.values.to_numpy().copy() for row in table[name]] for name in _TOKEN_COLUMNS]
    return [AnswerTokens(*row) for row in zip(*columns, strict=True)]


def _group(rows: Sequence[dict[str, Any]]) -> tuple[Group, Fate]:
    first = rows[0]
    prompt = Prompt(first["question_id"], first["question"], first["gold"], first["prompt_tokens"])
    answers = tuple(
        Answer(
            Completion(
                request_id=row["request_id"],
                index=row["answer_index"],
                tokens=row["answer_tokens"],
                logprobs=row["behaviour_logprobs"],
                finish_reason=row["finish_reason"],
                weight_version=row["weight_version"],
                seconds=row["generate_seconds"],
            ),
            row["answer"],
            Verdict(row["label"], row["reason"], row["verifier"], row["verify_seconds"]),
        )
        for row in rows
    )
    return Group(first["group_id"], first["step"], prompt, answers), first["fate"]
