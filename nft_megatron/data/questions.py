"""Reads questions: one rule serves all formats. A row is a dictionary, and :func:`question_of_row` finds the question, the gold
answer and the id in it; :mod:`nft_megatron.data.files` knows the files.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Question
from nft_megatron.data.files import Row, files_of, rows_of
from nft_megatron.data.golds import GoldError, is_blank, is_missing, read_gold

QUESTION_KEYS = ("prompt", "question", "problem")
GOLD_KEYS = ("answer", "gold", "ground_truth", "final_answer")
ID_KEYS = ("question_id", "id")
ROLES = ("system", "user", "assistant")
_COLUMNS = (*QUESTION_KEYS, *GOLD_KEYS, *ID_KEYS, "reward_model", "extra_info", "data_source", "source")
TRAIN_SPLIT = ("train",)
HELD_OUT_SPLIT = ("test", "validation", "train")


@dataclass(frozen=True)
class Columns:
    """Where a data set has its questions and golds, if not where most have them, and which config of a folder is read.

    A dot leads into a nested row: ``extra_info.answer``. ``is_required``: a row without them is an error; otherwise the usual
    names are tried too, for held-out data whose columns are others.

    >>> Columns(answer="extra_info.answer").names
    ('extra_info',)
    """

    question: str | None = None
    answer: str | None = None
    config_name: str | None = None
    is_required: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of the file that hold them, in lower case."""
        return tuple(name.partition(".")[0].lower() for name in (self.question, self.answer) if name)


@dataclass(frozen=True)
class DataSet:
    """What was read: the questions, the files they are from, and how many rows these have."""

    questions: tuple[Question, ...]
    files: tuple[Path, ...]
    num_rows: int


def load_questions(
    paths: Sequence[Path | str],
    field: str = "data.train",
    splits: Sequence[str] = TRAIN_SPLIT,
    columns: Columns = Columns(),
) -> list[Question]:
    """The questions of :func:`read_data_set`."""
    return list(read_data_set(paths, field, splits, columns).questions)


def read_data_set(
    paths: Sequence[Path | str],
    field: str = "data.train",
    splits: Sequence[str] = TRAIN_SPLIT,
    columns: Columns = Columns(),
) -> DataSet:
    """All questions of ``paths``, in file order, each id once.

    From a data set folder with several splits, the first of ``splits`` that it has is read.

    A row that repeats an earlier one (same id, question and gold: the public DAPO-Math-17k has each a hundred times) is left
    out. A row without an id is named after its place, ``folder/train.parquet/17``; if several paths are listed, the path's
    position comes first, so that equal names in two data sets stay distinct.

    Raises :class:`UserError` naming ``field`` if a file is missing, unreadable or empty, a row has no question or gold, or two
    different questions share an id.
    """
    questions: dict[str, Question] = {}
    files = [
        (i, path, file)
        for i, path in enumerate(map(Path, paths))
        for file in files_of(path, field, splits, columns.config_name, is_required=columns.is_required)
    ]
    num_rows = 0
    for position, path, file in files:
        name = file.name if file == path else f"{path.resolve().name}/{file.relative_to(path).as_posix()}"
        place = f"{position}/{name}" if len(paths) > 1 else name
        for number, row in enumerate(rows_of(file, field, (*_COLUMNS, *columns.names))):
            question = question_of_row(row, f"{place}/{number}", f"{file}, row {number}", field, columns)
            known = questions.setdefault(question.question_id, question)
            num_rows += 1
            if known != question:
                raise UserError(
                    field,
                    f"{file}, row {number}",
                    f"id {question.question_id!r} also belongs to another question or gold ({known.place})",
                    "give every question its own id, or remove the ids",
                )
    if not questions:
        raise UserError(field, ", ".join(map(str, paths)), "holds no questions", "name a file with at least one row")
    return DataSet(tuple(questions.values()), tuple(file for *_, file in files), num_rows)


def question_of_row(
    row: Row,
    default_id: str,
    where: str,
    field: str,
    columns: Columns = Columns(),
) -> Question:
    r"""The question in one row, whatever its columns are called; ``where`` names the row in errors.

    >>> row = {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}}
    >>> question_of_row(row, "f/0", "f, row 0", "data.train")
    Question(question_id='f/0', messages=({'role': 'user', 'content': '1+1?'},), gold='2', source='')
    >>> question_of_row({"id": "a", "problem": "1+1?", "answer": 2}, "f/0", "f, row 0", "data.train").question_id
    'a'
    """
    row = {key.lower(): value for key, value in row.items()}
    asked = _named(row, columns.question, "data.question_field", where, columns)
    if asked is None and (columns.question is None or not columns.is_required):
        asked = _first(row, QUESTION_KEYS)
    if isinstance(asked, str) and (is_blank(asked) or is_missing(asked)):
        raise UserError(field, where, f"has no question: the text is {asked!r}", "write the question there, or remove the row")
    if not asked:
        raise _missing(row, "question", QUESTION_KEYS, where, field, "data.question_field")
    messages = _messages(asked, where, field)
    gold = _gold(row, where, field, columns)
    source = str(_first(row, ("data_source", "source")) or "")
    index = _first(_section(row, "extra_info"), ("index",))
    given_id = _first(row, ID_KEYS) if index is None else index
    # A number only counts rows within a file; a string is taken to be unique.
    question_id = given_id if isinstance(given_id, str) and given_id else default_id
    question = Question(question_id, messages, gold, source, where)
    _check_characters(question, where, field)
    return question


def _named(row: Row, name: str | None, option: str, where: str, columns: Columns) -> Any:
    """The value of the column that ``option`` names; None when it names none."""
    value: Any = row
    parts = name.lower().split(".") if name else []
    for depth, part in enumerate(parts):
        inner = _section(value, parts[depth - 1]) if depth else value
        value = {key.lower(): item for key, item in inner.items()}
        if part not in value:
            if columns.is_required:
                raise UserError(option, name, f"{where} has no such column (it has {_present(row)})", "name one of those")
            return None
        if depth == len(parts) - 1:
            return value[part]
    return None


def _gold(row: Row, where: str, field: str, columns: Columns) -> str:
    value = _named(row, columns.answer, "data.answer_field", where, columns)
    if value is None and (columns.answer is None or not columns.is_required):
        value = _first(_section(row, "reward_model"), ("ground_truth",))
        value = _first(row, GOLD_KEYS) if value is None else value
    try:
        gold = read_gold(value)
    except GoldError as error:
        raise UserError(field, where, f"the gold {error}", "write the answer there, or remove the row") from error
    if not gold:
        raise _missing(row, "gold answer", (*GOLD_KEYS, "reward_model.ground_truth"), where, field, "data.answer_field")
    return gold


def _messages(asked: Any, where: str, field: str) -> tuple[dict[str, str], ...]:
    """The conversation: a text is the user's, unless it is a list of messages written as text."""
    messages = (_written_list(asked) or [{"role": "user", "content": asked}]) if isinstance(asked, str) else asked
    messages = [messages] if isinstance(messages, dict) else messages
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise UserError(field, where, "the question is neither text nor a list of {role, content}", "make it one of the two")
    roles = [message["role"] for message in messages]
    if unknown := [role for role in roles if role not in ROLES]:
        raise UserError(field, where, f"a message has the role {unknown[0]!r}", f"use {', '.join(ROLES)}")
    if roles[-1] != "user":
        problem = f"the question ends with the message of role {roles[-1]!r}, which would be part of the prompt"
        raise UserError(field, where, problem, "end it with the user's message; the answer belongs into the gold's column")
    if any(message["role"] == "user" and is_blank(message["content"]) for message in messages):
        raise UserError(field, where, "the user's message is empty", "write the question there, or remove the row")
    return tuple({key: message[key] for key in ("role", "content")} for message in messages)


def _written_list(text: str) -> list[Any] | None:
    """The list of messages that a program wrote as JSON, or as Python, into a column of text; None for any other text.

    >>> _written_list('[{"role": "user", "content": "1?"}]') == _written_list("[{'role': 'user', 'content': '1?'}]")
    True
    """
    text = (_written(text, '"[{') or _written(text, '"{') or text) if text.startswith('"') else text
    value = _written(text, "[{") or _written(text, "{")
    value = [value] if isinstance(value, dict) else value
    is_chat = isinstance(value, list) and all(isinstance(item, dict) for item in value)
    return value if is_chat and any("role" in item or "content" in item for item in value) else None


def _written(text: str, opening: str) -> Any:
    if not "".join(text[:20].split()).startswith(opening):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def _check_characters(question: Question, where: str, field: str) -> None:
    texts = {"question": question.text, "gold": question.gold, "id": question.question_id, "source": question.source}
    texts |= {f"{message['role']} message": message["content"] for message in question.messages if message["role"] != "user"}
    for what, text in texts.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            character = f"\\u{ord(text[error.start]):04x}"
            problem = f"the {what} has half a character, {character} at position {error.start}, which is no text"
            raise UserError(field, where, problem, "write the whole character, or remove the row") from error


def _first(row: Row, keys: Sequence[str]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _section(row: Row, key: str) -> Row:
    """The nested row under ``key``, also where it is written as text; another text has neither gold nor id."""
    value = row.get(key)
    value = _written(value, "{") if isinstance(value, str) else value
    return value if isinstance(value, dict) else {}


def _present(row: Row) -> str:
    return ", ".join(key for key in row if row[key] is not None) or "nothing"


def _missing(row: Row, what: str, looked_for: Sequence[str], where: str, field: str, option: str) -> UserError:
    remedy = f"name the column one of {', '.join(looked_for)}, or set {option}"
    return UserError(field, where, f"has no {what} (it has {_present(row)})", remedy)
