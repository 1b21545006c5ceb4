"""Reading data sets that pyarrow, or a text editor, wrote."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from own_questions import TRAINING, dapo_row, write_dapo, write_training

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Question
from nft_megatron.data.questions import HELD_OUT_SPLIT, load_questions
from nft_megatron.data.wording import bare, worded


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def question(question_id: str, text: str, gold: str, source: str = "") -> Question:
    return Question(question_id, ({"role": "user", "content": text},), gold, source)


def write_arrow_stream(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def save_to_disk(folder: Path, *shards: list[dict[str, Any]]) -> Path:
    """What ``datasets.Dataset.save_to_disk`` leaves: Arrow streams, and state.json that lists them."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        write_arrow_stream(folder / name, pa.Table.from_pylist(rows))
    (folder / "cache-1234.arrow").write_bytes(b"left by a map()")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train"}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_dapo_parquet(tmp_path: Path) -> None:
    path = write_dapo(tmp_path / "dapo.parquet", dapo_row("u1", "1+1?", "2"), dapo_row("u2", "2+2?", "4"))
    assert load_questions([path]) == [question("u1", "1+1?", "2", "math_dapo"), question("u2", "2+2?", "4", "math_dapo")]


def test_repeated_rows_count_once(tmp_path: Path) -> None:
    """The public file holds every row a hundred times."""
    rows = [dapo_row("u1", "1+1?", "2"), dapo_row("u2", "2+2?", "4")]
    path = write_dapo(tmp_path / "dapo.parquet", *rows * 100)
    assert [q.question_id for q in load_questions([path])] == ["u1", "u2"]


def test_dapo_wording(tmp_path: Path) -> None:
    """As published; golds of any size, also 0 and negative ones, arrive as they are."""
    loaded = load_questions([write_training(tmp_path / "dapo.parquet")])
    assert [(q.question_id, bare(q.text), q.gold) for q in loaded] == TRAINING
    assert all(q.text == worded(bare(q.text), "answer") != bare(q.text) for q in loaded)
    assert sum(abs(int(q.gold.replace(",", ""))) >= 10_000 for q in loaded) == 103  # 101 sums, a debt, a power


@pytest.mark.parametrize("asked", ["question", "problem", "prompt"])
@pytest.mark.parametrize("gold", ["answer", "gold", "ground_truth"])
def test_plain_columns(tmp_path: Path, asked: str, gold: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    jsonl = write_jsonl(folder / "a.jsonl", {asked: "1+1?", gold: 2}, {"id": "x", asked: "1/2?", gold: "1/2"})
    parquet = folder / "b.parquet"
    pq.write_table(pa.table({asked: ["1+1?"], gold: [2], "solution": ["…"]}), parquet)
    expected = [question("0/a.jsonl/0", "1+1?", "2"), question("x", "1/2?", "1/2"), question("1/b.parquet/0", "1+1?", "2")]
    assert load_questions([jsonl, parquet]) == expected


def test_dapo_like_jsonl(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", dapo_row("u1", "1+1?", "2"))
    assert load_questions([path]) == [question("u1", "1+1?", "2", "math_dapo")]


def test_numbers_are_no_ids(tmp_path: Path) -> None:
    """verl's data sets number the rows of each file from 0."""
    row = {"question": "1+1?", "answer": "2", "extra_info": {"index": 0}}
    paths = [write_jsonl(tmp_path / "a.jsonl", row), write_jsonl(tmp_path / "b.jsonl", row)]
    assert [q.question_id for q in load_questions(paths)] == ["0/a.jsonl/0", "1/b.jsonl/0"]


def test_equal_file_names_in_two_data_sets_are_told_apart(tmp_path: Path) -> None:
    for name, asked in (("A", "1+1?"), ("B", "2+2?")):
        (tmp_path / name / "data").mkdir(parents=True)
        write_jsonl(tmp_path / name / "data" / "train-00000.jsonl", {"question": asked, "answer": "4"})
    both = load_questions([tmp_path / "A", tmp_path / "B"])
    assert both == [
        question("0/A/data/train-00000.jsonl/0", "1+1?", "4"),
        question("1/B/data/train-00000.jsonl/0", "2+2?", "4"),
    ]
    assert load_questions([tmp_path / "B"]) == [question("B/data/train-00000.jsonl/0", "2+2?", "4")]


@pytest.mark.parametrize("odd", ["a text", 7, ["index"]])
def test_a_text_where_others_nest_is_passed_over(tmp_path: Path, odd: Any) -> None:
    row = {"id": "x", "question": "1+1?", "answer": "2", "reward_model": odd, "extra_info": odd}
    assert load_questions([write_jsonl(tmp_path / "a.jsonl", row)]) == [question("x", "1+1?", "2")]


def test_save_to_disk_folder(tmp_path: Path) -> None:
    rows = [{"id": f"q{i}", "question": f"{i}?", "answer": str(i)} for i in range(5)]
    folder = save_to_disk(tmp_path / "set", rows[:3], rows[3:])
    assert load_questions([folder]) == [question(f"q{i}", f"{i}?", str(i)) for i in range(5)]


def test_save_to_disk_of_several_splits(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "set" / "train", [{"id": "a", "question": "1?", "answer": "1"}])
    save_to_disk(tmp_path / "set" / "test", [{"id": "b", "question": "2?", "answer": "2"}])
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert load_questions([tmp_path / "set"]) == [question("a", "1?", "1")]


def test_folder_as_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("# a data set")
    write_dapo(tmp_path / "data" / "train-00000-of-00002.parquet", dapo_row("a", "1?", "1"))
    write_dapo(tmp_path / "data" / "train-00001-of-00002.parquet", dapo_row("b", "2?", "2"))
    write_dapo(tmp_path / "data" / "test-00000-of-00001.parquet", dapo_row("c", "3?", "3"))
    assert [q.question_id for q in load_questions([tmp_path])] == ["a", "b"]


def test_a_test_split_is_never_taken_for_training(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test.jsonl", {"question": "1?", "answer": "1"})
    write_jsonl(tmp_path / "constraints.jsonl", {"question": "2?", "answer": "2"})
    with pytest.raises(UserError, match=r"none named train: constraints\.jsonl, test\.jsonl"):
        load_questions([tmp_path])


def test_held_out_questions_come_from_the_test_split(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", {"id": split, "question": "1?", "answer": "1"})
    assert [q.question_id for q in load_questions([tmp_path], splits=HELD_OUT_SPLIT)] == ["test"]
    (tmp_path / "test.jsonl").unlink()
    assert [q.question_id for q in load_questions([tmp_path], splits=HELD_OUT_SPLIT)] == ["validation"]
    assert [q.question_id for q in load_questions([tmp_path])] == ["train"]


def test_columns_of_the_benchmarks_on_the_hub(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"ID": ["x"], "Problem": ["1?"], "Answer": [27.0], "Solution": ["…"]}), path)
    assert load_questions([path]) == [question("x", "1?", "27")]
    several = write_jsonl(tmp_path / "b.jsonl", {"id": "y", "question": "2?", "final_answer": ["$1$", "$2$"]})
    assert load_questions([several]) == [question("y", "2?", "$1$, $2$")]
    fraction = write_jsonl(tmp_path / "c.jsonl", {"id": "z", "question": "3?", "answer": 0.5})
    assert load_questions([fraction]) == [question("z", "3?", "0.5")]


def broken(path: Path) -> Path:
    """A Parquet file cut in half."""
    write_dapo(path, *[dapo_row(f"u{i}", "1+1?" * 50, "2") for i in range(200)])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda folder: folder / "missing.parquet", "no such file"),
        (lambda folder: broken(folder / "cut.parquet"), "unreadable"),
        (lambda folder: write_jsonl(folder / "a.txt", {}), r"unknown kind of file '\.txt'"),
        (lambda folder: write_dapo(folder / "empty.parquet"), "holds no questions"),
        (lambda folder: write_jsonl(folder / "empty.jsonl"), "holds no questions"),
        (lambda folder: folder, "holds no"),
        (lambda folder: write_jsonl(folder / "a.jsonl", [1]), "unreadable at row 0: not a JSON object"),
        (
            lambda folder: write_jsonl(folder / "a.jsonl", {"text": "1+1?", "answer": "2"}),
            r"has no question \(it has text, answer\)",
        ),
        (lambda folder: write_jsonl(folder / "a.jsonl", {"question": "1+1?"}), r"has no gold answer \(it has question\)"),
        (lambda folder: write_jsonl(folder / "a.jsonl", {"question": "1+1?", "answer": " "}), "has no gold answer"),
        (lambda folder: write_dapo(folder / "a.parquet", dapo_row("u", "1+1?", None)), "has no gold answer"),
        (
            lambda folder: write_jsonl(folder / "a.jsonl", {"prompt": [{"text": "?"}], "answer": "2"}),
            "neither text nor a list",
        ),
        (
            lambda folder: write_dapo(folder / "a.parquet", dapo_row("u", "1?", "1"), dapo_row("u", "2?", "2")),
            "id 'u' also belongs to",
        ),
        (
            lambda folder: write_dapo(folder / "a.parquet", dapo_row("u", "1?", "1"), dapo_row("u", "1?", "2")),
            "id 'u' also belongs to",
        ),
    ],
)
def test_mistakes(tmp_path: Path, make: Any, problem: str) -> None:
    path = make(tmp_path)
    with pytest.raises(UserError, match=problem) as caught:
        load_questions([path], field="evaluate.data")
    assert str(caught.value).startswith(f"evaluate.data = {path}")
    assert caught.value.remedy


def test_truncated_arrow(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "set", [{"question": "1?" * 500, "answer": "1"}] * 50)
    (file,) = folder.glob("data-*.arrow")
    file.write_bytes(file.read_bytes()[:4000])
    with pytest.raises(UserError, match="unreadable at row"):
        load_questions([folder])
