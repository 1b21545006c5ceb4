"""Kinds of files, and the configs of a Hugging Face data set folder."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.data import files
from nft_megatron.data.questions import Columns, load_questions

ROWS = [{"question": "1+1?", "answer": "2"}, {"question": "2+2?", "answer": "4"}]


def asked(path: Path, **columns: Any) -> list[tuple[str, str]]:
    return [(question.text, question.gold) for question in load_questions([path], columns=Columns(**columns))]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json", json.dumps({"version": "1.0", "data": ROWS})),
        ("a.json", json.dumps({"source": "us", "rows": ROWS})),
        ("a.json", json.dumps({"question": ["1+1?", "2+2?"], "answer": ["2", "4"]})),
        ("a.json", json.dumps({"question": {"0": "1+1?", "1": "2+2?"}, "answer": {"0": 2, "1": 4}})),  # pandas
        ("a.json", json.dumps({"a": ROWS[0], "b": ROWS[1]})),
        ("a.json", "\n".join(map(json.dumps, ROWS))),
        ("A.JSONL", "\n".join(map(json.dumps, ROWS))),
        ("a.json", "\ufeff" + json.dumps(ROWS)),
        ("a.jsonl", "\ufeff" + "\n".join(map(json.dumps, ROWS))),
        ("a.csv", "question,answer\n1+1?,2\n2+2?,4\n"),
        ("a.csv", '\ufeffQuestion,Answer\r\n"1+1?","2"\r\n"2+2?","4"\r\n'),
        ("a.csv", ",question, answer\n0,1+1?,2\n\n1,2+2?,4\n"),
        ("a.tsv", "question\tanswer\n1+1?\t2\n2+2?\t4\n"),
    ],
)
def test_kinds_of_files(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert asked(path) == [("1+1?", "2"), ("2+2?", "4")]


def test_csv_with_lines_commas_and_nested_json(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    chat = json.dumps([{"role": "user", "content": "1,1\nor 2?"}]).replace('"', '""')
    path.write_text(f'prompt,reward_model\n"{chat}","{{""ground_truth"": ""2""}}"\n')
    assert asked(path) == [("1,1\nor 2?", "2")]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", "question,answer\n1,2,3\n", "unreadable at row 0: more values than the 2 columns"),
        ("a.csv", 'question,answer\n1+1?,2\n"2+2?,4\n', "unreadable at row 1"),
        ("a.csv", "question,answer\n1+1?\n", "has no gold answer"),
        ("a.csv", "question,answer,answer\n1+1?,2,3\n", "has two columns called 'answer'; rename or remove one"),
        ("a.csv", "question;answer\n1+1?;2\n", "row 0: has no question .it has question;answer."),
        ("a.json", '{"a": {"b": 1}, "x": [1], "y": [2]}', "several arrays of rows: x, y; write each into a file of its own"),
        ("a.json", '{"a": 1, "x": [1]}', "an array 'x' whose items are not all objects"),
        ("a.jsonl", '[{"question": "1+1?", "answer": "2"}]', "not a JSON object: .* and has one JSON object per line"),
        ("a.json", '[{"question": "1?"', "unreadable at row 0"),
        ("a.json", "[1, 2]", "not a JSON object: '1'"),
        ("a.json", "7", "not an array"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=problem) as caught:
        asked(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_one_json_object_is_one_row(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    for content in (ROWS[0], {"prompt": chat, "answer": "2"}, {"prompt": chat, "answer": ["2"]}):
        (tmp_path / "a.json").write_text(json.dumps(content))
        assert asked(tmp_path / "a.json") == [("1+1?", "2")]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.csv").write_text("question,answer\nDécris 1?,1\n", encoding=encoding)
    with pytest.raises(UserError, match=r"a\.csv: is not UTF-8: .*; save it as UTF-8"):
        asked(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        (pa.float32(), 0.1),
        (pa.list_(pa.float32()), [0.1]),
        (pa.float16(), np.float16(0.1)),
        (pa.string(), "0.1"),
        (pa.binary(), b"0.1"),
        (pa.decimal128(4, 1), Decimal("0.1")),
    ],
)
def test_columns_have_what_was_written(tmp_path: Path, type_: pa.DataType, value: Any) -> None:
    """Not 0.10000000149, and text for bytes; in a column and in a nested row."""
    column = pa.array([value], type_)
    pq.write_table(pa.table({"question": ["1?"], "answer": column}), tmp_path / "a.parquet")
    nested = pa.StructArray.from_arrays([column], names=["ground_truth"])
    pq.write_table(pa.table({"question": [b"1?"], "reward_model": nested}), tmp_path / "b.parquet")
    assert asked(tmp_path / "a.parquet") == asked(tmp_path / "b.parquet") == [("1?", "0.1")]


def test_arrow_files_are_read_like_streams(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    assert asked(tmp_path / "a.arrow") == [("1+1?", "2"), ("2+2?", "4")]


def test_what_editors_and_archives_leave_is_no_data(tmp_path: Path) -> None:
    for hidden in (".ipynb_checkpoints/train-checkpoint.jsonl", "__MACOSX/._train.jsonl", "._train.jsonl"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_text("{")
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[0]))
    assert asked(tmp_path) == [("1+1?", "2")]


def test_in_a_folder_json_counts_only_where_there_is_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps(ROWS))
    (tmp_path / "dataset_info.json").write_text("{}")
    assert len(asked(tmp_path)) == 2
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[0]))
    assert asked(tmp_path) == [("1+1?", "2")]


def folder_of_configs(folder: Path) -> Path:
    for name, rows in (("main", ROWS), ("socratic", ROWS[:1])):
        for split in ("train", "test"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            content = "\n".join(json.dumps(row | {"id": f"{split}-{row['question']}"}) for row in rows)
            (folder / name / f"{split}-00000-of-00001.jsonl").write_text(content)
    return folder


def test_several_configs_are_refused_with_their_names(tmp_path: Path) -> None:
    folder = folder_of_configs(tmp_path / "gsm")
    with pytest.raises(
        UserError, match=r"data\.train = .*gsm: has several configs, .*: main, socratic; choose one: data\.config"
    ):
        asked(folder)
    assert len(asked(folder, config_name="main")) == 2
    assert asked(folder, config_name="socratic") == [("1+1?", "2")]
    with pytest.raises(UserError, match=r"data\.config_name = easy: data\.train = .* no such config; it has main, socratic"):
        asked(folder, config_name="easy")


def test_configs_inside_data_and_beside_files(tmp_path: Path) -> None:
    folder_of_configs(tmp_path / "data")
    assert len(asked(tmp_path, config_name="main")) == 2
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[1]))
    assert asked(tmp_path, config_name="default") == [("2+2?", "4")]


def test_folders_that_are_splits_are_no_configs(tmp_path: Path) -> None:
    for split, row in zip(("train", "test"), ROWS, strict=True):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "0000.jsonl").write_text(json.dumps(row))
    assert asked(tmp_path) == [("1+1?", "2")]


README = """---
license: mit
configs:
- config_name: easy
  data_files:
  - split: train
    path: easy_a.jsonl
  - split: test
    path: easy_b.jsonl
- config_name: hard
  data_files: hard/*.jsonl
- config_name: elsewhere
  data_files: ../*.jsonl
---
# Questions
"""


def test_configs_as_the_readme_lists_them(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "hard").mkdir()
    for name, row in (("easy_a", ROWS[0]), ("easy_b", ROWS[1]), ("hard/only", ROWS[1])):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"several configs.*: easy, hard;"):
        asked(tmp_path)
    assert asked(tmp_path, config_name="easy") == [("1+1?", "2")]
    assert asked(tmp_path, config_name="hard") == [("2+2?", "4")]


def test_what_is_named_is_not_passed_over(tmp_path: Path) -> None:
    """A named column without a value in some row: the usual names would be something else."""
    path = tmp_path / "train.jsonl"
    path.write_text('{"asked": null, "question": "1+1?", "answer": "2"}')
    with pytest.raises(UserError, match=r"train\.jsonl, row 0: has no question \(it has question, answer\)"):
        asked(path, question="asked")
    with pytest.raises(UserError, match=r"train\.jsonl, row 0: has no gold answer \(it has question, answer\)"):
        asked(path, question="question", answer="asked")


def test_held_out_data_may_have_the_usual_columns_and_no_configs(tmp_path: Path) -> None:
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held"
    train.write_text(json.dumps({"Query": "1+1?", "extra_info": {"Solution": "Add.\n#### 2"}, "answer": "-"}))
    held_out.mkdir()
    (held_out / "test.jsonl").write_text(json.dumps(ROWS[0]))
    names = {"question": "query", "answer": "extra_info.solution", "config_name": "main"}
    assert asked(train, **names) == [("1+1?", "2")]
    with pytest.raises(UserError, match=r"data\.config_name = main"):
        asked(held_out, **names)
    relaxed = load_questions([held_out], "evaluate.data", ("test",), Columns(**names, is_required=False))
    assert [(question.text, question.gold) for question in relaxed] == [("1+1?", "2")]
    with pytest.raises(
        UserError, match=r"data\.question_field = quest: .*train\.jsonl, row 0 has no such column \(it has query,"
    ):
        asked(train, question="quest")
    with pytest.raises(UserError, match=r"data\.answer_field = extra_info\.gold: .*row 0 has no such column"):
        asked(train, question="query", answer="extra_info.gold")


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", DEEP, "unreadable at row 0: nested too deeply"),
        ("a.jsonl", '{"question": ' + DEEP + "]" * 100_000 + "}", "nested too deeply"),
        ("a.jsonl", json.dumps(ROWS[0]) + "\n" + DEEP, "unreadable at row 1: nested too deeply"),
        ("a.jsonl", '{"question": "1+1?", "answer": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ("a.json", DEEP, "nested too deeply"),
        ("a.json", '{"rows": ' + DEEP, "nested too deeply"),
        ("a.jsonl", "\0" * 100, "unreadable at row 0"),
        ("a.parquet", "PAR1" + "\0" * 100 + "PAR1", "unreadable at row 0"),
        ("a.arrow", "ARROW1" + "\xff" * 100, "unreadable at row 0"),
    ],
    ids=lambda value: value[:20],
)
def test_a_hostile_data_file_is_refused_with_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=message) as refused:
        asked(tmp_path / name)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 2500


def _parquet(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, compression="zstd")


def _stream(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)


def _file(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(("name", "write"), [("a.parquet", _parquet), ("a.arrow", _stream), ("b.arrow", _file)])
@pytest.mark.parametrize("num_rows", [10_000, 1_000_000])
def test_a_file_that_holds_terabytes_of_one_text_is_refused(tmp_path: Path, monkeypatch, name, write, num_rows) -> None:
    """100,000 characters a row; in Arrow files by a dictionary."""
    monkeypatch.setattr(files, "_LEAST_BYTES", 32 << 20)
    monkeypatch.setattr(files, "_RATIO", 10)
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(num_rows, dtype=np.int32)), pa.array(["x" * 100_000]))
    write(tmp_path / name, pa.table({"question": column, "answer": pa.DictionaryArray.from_arrays(column.indices, ["2"])}))
    assert (tmp_path / name).stat().st_size < 10 << 20
    with pytest.raises(UserError, match=r"has [\d,]+ bytes and holds more than [\d,]+"):
        asked(tmp_path / name)


def test_a_part_that_memory_does_not_hold_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "_PART_BYTES", 256 << 20)
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(200, dtype=np.int32)), pa.array(["x" * 10_000_000]))
    _parquet(tmp_path / "a.parquet", pa.table({"question": column, "answer": ["2"] * 200}))
    with pytest.raises(UserError, match="256 MiB of memory do not hold 256 rows of it"):
        asked(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        DEEP,
        '{"_data_files": 5}',
        '{"_data_files": []}',
        '{"_data_files": ["a"]}',
        '{"_data_files": [{"filename": 5}]}',
        '{"_data_files": [{"filename": "../secret.arrow"}]}',
        '{"_data_files": [{"filename": "/etc/passwd"}]}',
        '{"_data_files": [{"filename": "a\\u0000b"}]}',
    ],
    ids=lambda content: content[:40],
)
def test_a_saved_data_set_lists_files_of_its_own_folder(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"state\.json: (is|does) (not|nested)"):
        asked(tmp_path)
