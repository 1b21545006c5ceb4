"""Reads questions: Parquet in the schema of DAPO-Math-17k, JSONL, or a local Hugging Face data set folder.

One rule serves all formats: a row is a dictionary, and :func:`question_of_row` finds the question, the gold answer and the
id in it. Arrow files from ``datasets.save_to_disk`` are Arrow IPC streams, which pyarrow reads by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Question

QUESTION_KEYS = ("prompt", "question", "problem")
GOLD_KEYS = ("answer", "gold", "ground_truth", "final_answer")
ID_KEYS = ("question_id", "id")
_COLUMNS = (*QUESTION_KEYS, *GOLD_KEYS, *ID_KEYS, "reward_model", "extra_info", "data_source", "source")
TRAIN_SPLIT = ("train",)
HELD_OUT_SPLIT = ("test", "validation", "train")

Row = dict[str, Any]


def load_questions(
    paths: Sequence[Path | str], field: str = "data.train", splits: Sequence[str] = TRAIN_SPLIT
) -> list[Question]:
    """All questions of ``paths``, in file order, each id once.

    From a data set folder with several splits, the first of ``splits`` that it has is read.

    A row that repeats an earlier one (same id, question and gold: the public DAPO-Math-17k has each a hundred times) is left
    out. A row without an id is named after its place, ``folder/train.parquet/17``; if several paths are listed, the path's
    position comes first, so that equal names in two data sets stay distinct.

    Raises :class:`UserError` naming ``field`` if a file is missing, unreadable or empty, a row has no question or gold, or two
    different questions share an id.
    """
    questions: dict[str, Question] = {}
    for position, path in enumerate(map(Path, paths)):
        if not path.exists():
            raise UserError(field, path, "no such file or folder", "check the path")
        for file in _files_of(path, field, splits):
            name = file.name if file == path else f"{path.resolve().name}/{file.relative_to(path).as_posix()}"
            place = f"{position}/{name}" if len(paths) > 1 else name
            for number, row in enumerate(_rows_of(file, field)):
                question = question_of_row(row, f"{place}/{number}", f"{file}, row {number}", field)
                known = questions.setdefault(question.question_id, question)
                if known != question:
                    raise UserError(
                        field,
                        f"{file}, row {number}",
                        f"id {question.question_id!r} also belongs to another question or gold",
                        "give every question its own id, or remove the ids",
                    )
    if not questions:
        raise UserError(field, ", ".join(map(str, paths)), "holds no questions", "name a file with at least one row")
    return list(questions.values())


def question_of_row(row: Row, default_id: str, where: str, field: str) -> Question:
    r"""The question in one row, whatever its columns are called; ``where`` names the row in errors.

    >>> row = {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}}
    >>> question_of_row(row, "f/0", "f, row 0", "data.train")
    Question(question_id='f/0', messages=({'role': 'user', 'content': '1+1?'},), gold='2', source='')
    >>> question_of_row({"id": "a", "problem": "1+1?", "answer": 2}, "f/0", "f, row 0", "data.train").question_id
    'a'
    """
    row = {key.lower(): value for key, value in row.items()}
    asked = _first(row, QUESTION_KEYS)
    if not asked:
        raise _missing(row, "question", QUESTION_KEYS, where, field)
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if not _are_messages(messages):
        raise UserError(field, where, "the question is neither text nor a list of {role, content}", "make it one of the two")
    gold = _first(_section(row, "reward_model"), ("ground_truth",))
    gold = _as_text(_first(row, GOLD_KEYS) if gold is None else gold)
    if not gold.strip():
        raise _missing(row, "gold answer", (*GOLD_KEYS, "reward_model.ground_truth"), where, field)
    source = str(_first(row, ("data_source", "source")) or "")
    index = _first(_section(row, "extra_info"), ("index",))
    given_id = _first(row, ID_KEYS) if index is None else index
    # A number only counts rows within a file; a string is taken to be unique.
    question_id = given_id if isinstance(given_id, str) and given_id else default_id
    return Question(
        question_id, tuple({key: message[key] for key in ("role", "content")} for message in messages), gold, source
    )


def _first(row: Row, keys: Sequence[str]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _as_text(gold: Any) -> str:
    """A gold answer as text, empty if there is none: 27.0 becomes 27, several answers become one list."""
    if isinstance(gold, float) and gold.is_integer():
        gold = int(gold)
    if isinstance(gold, list):
        return ", ".join(map(_as_text, gold))
    return str(gold) if isinstance(gold, (str, int, float)) else ""


def _section(row: Row, key: str) -> Row:
    """The nested row under ``key``; some data sets have a string there, which gives neither gold nor id."""
    return row[key] if isinstance(row.get(key), dict) else {}


def _are_messages(messages: Any) -> bool:
    return isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )


def _missing(row: Row, what: str, looked_for: Sequence[str], where: str, field: str) -> UserError:
    present = ", ".join(key for key in row if row[key] is not None) or "nothing"
    return UserError(field, where, f"has no {what} (it has {present})", f"name the column one of {', '.join(looked_for)}")


def _files_of(path: Path, field: str, splits: Sequence[str]) -> list[Path]:
    """``path`` itself, or a data set folder's files of the first of ``splits`` that it has."""
    if path.is_file():
        return [path]
    if (path / "dataset_dict.json").exists():
        folders = [folder for folder in sorted(path.iterdir()) if (folder / "state.json").exists()]
        return _files_of(_of_split(folders, path, field, splits)[0], field, splits)
    if (path / "state.json").exists():
        state = json.loads((path / "state.json").read_text())
        return [path / entry["filename"] for entry in state["_data_files"]]
    files = sorted(file for suffix in _READERS for file in path.rglob(f"*{suffix}"))
    if not files:
        raise UserError(field, path, f"holds no {', '.join(_READERS)} file", "name a file or a data set folder")
    return _of_split(files, path, field, splits)


def _of_split(candidates: list[Path], path: Path, field: str, splits: Sequence[str]) -> list[Path]:
    """Those named after the first split that occurs, else the only candidate. Taking all would train on a test split."""
    for split in splits:
        named = re.compile(f"(?<![a-z]){split}(?![a-z])")
        if found := [candidate for candidate in candidates if named.search(str(candidate.relative_to(path)))]:
            return found
    if len(candidates) != 1:
        names = ", ".join(candidate.name for candidate in candidates[:5])
        problem = f"has several parts but none named {' or '.join(splits)}: {names}"
        raise UserError(field, path, problem, "name the files themselves")
    return candidates


def _rows_of(file: Path, field: str) -> Iterator[Row]:
    reader = _READERS.get(file.suffix)
    if reader is None:
        raise UserError(field, file, f"unknown kind of file {file.suffix!r}", f"use one of {', '.join(_READERS)}")
    number = 0
    try:
        for row in reader(file):
            yield row
            number += 1
    except (pa.ArrowException, ValueError, OSError) as error:
        problem = f"unreadable at row {number}: {str(error).splitlines()[0]}"
        raise UserError(field, file, problem, "check that the file is complete, or download it again") from error


def _parquet_rows(file: Path) -> Iterator[Row]:
    with pq.ParquetFile(file) as parquet:
        columns = [name for name in parquet.schema_arrow.names if name.lower() in _COLUMNS]
        for batch in parquet.iter_batches(batch_size=4096, columns=columns or None):
            yield from batch.to_pylist()


def _arrow_rows(file: Path) -> Iterator[Row]:
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
        for batch in stream:
            yield from batch.select(
                [name for name in batch.schema.names if name.lower() in _COLUMNS] or batch.schema.names
            ).to_pylist()


def _jsonl_rows(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"not a JSON object: {line[:40]!r}")
                yield row


_READERS = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows, ".arrow": _arrow_rows}
