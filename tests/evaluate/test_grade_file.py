"""``nft-megatron verify`` on small files."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Answer, Completion, Group, Prompt, Verdict
from nft_megatron.data.ledger import write_ledger
from nft_megatron.data.questions import load_questions
from nft_megatron.evaluate.grade_file import Fields, verify_file
from nft_megatron.verify.rules import rules_of

ROWS = [
    {"id": 7, "text": r"so \boxed{34}", "gold": "34"},
    {"id": 8, "text": r"\boxed{35}", "gold": 34},
    {"id": 9, "text": "It is 34.", "gold": "34", "note": "ü"},
    {"id": 10, "text": r"\boxed{34}", "gold": "34", "finish_reason": "length"},
    {"id": 11, "text": r"\boxed{34}", "gold": "34", "finish_reason": "abort"},
    {"id": 12, "text": r"\boxed{34}", "gold": "34", "finish_reason": "stop"},
]
EXPECTED = [
    ("correct", "exact"),
    ("wrong", "another number"),
    ("wrong", "no closed box"),
    ("wrong", "truncated"),
    ("unknown", "engine fault"),
    ("correct", "exact"),
]
FIELDS = {"answer_field": "text", "gold_field": "gold", "mode": "strict"}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_come_back_with_verdicts(tmp_path, capsys):
    out = tmp_path / "folder" / "out.jsonl"
    verify_file(write_jsonl(tmp_path / "answers.jsonl", ROWS), out=out, **FIELDS)
    graded = [row | {"verdict": label, "reason": reason} for row, (label, reason) in zip(ROWS, EXPECTED, strict=True)]
    assert read_jsonl(out) == graded
    printed = capsys.readouterr().out.split()
    assert "2 33.33%" in " ".join(printed), "two of six are exact"
    assert " ".join(printed).endswith(f"correct 33.33%, wrong 50.00%, unknown 16.67% of 6 answers {out}")


def test_parquet_and_other_field_names(tmp_path):
    rows = [{"pred": row["text"], "answer": str(row["gold"]), "id": row["id"]} for row in ROWS[:3]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "answers.parquet")
    out = tmp_path / "out.jsonl"
    verify_file(tmp_path / "answers.parquet", answer_field="pred", gold_field="answer", mode="dapo", out=out)
    assert [(row["id"], row["verdict"]) for row in read_jsonl(out)] == [(7, "correct"), (8, "wrong"), (9, "wrong")]


def test_more_rows_than_are_read_ahead(tmp_path):
    path = write_jsonl(tmp_path / "many.jsonl", [{"text": rf"\boxed{{{i}}}", "gold": i - i % 2} for i in range(3000)])
    verify_file(path, out=tmp_path / "out.jsonl", **FIELDS)
    assert [row["verdict"] == "correct" for row in read_jsonl(tmp_path / "out.jsonl")] == [i % 2 == 0 for i in range(3000)]


def test_golds_are_read_as_those_of_training(tmp_path):
    golds = ["2+3=<<2+3=5>>5\n#### 5", r"So it is \boxed{5}.", 5.0, "5", ["5"], '["5"]']
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": r"\boxed{5}", "gold": gold} for gold in golds])
    verify_file(path, out=tmp_path / "out.jsonl", **FIELDS)
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert [(row["verdict"], row["gold"]) for row in rows] == [("correct", gold) for gold in golds]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps([{"text": r"\boxed{5}", "gold": 5}, {"text": r"\boxed{6}", "gold": 5}])),
        ("a.csv", "text,gold\n\\boxed{5},5\n\\boxed{6},5\n"),
        ("a.TSV", "text\tgold\n\\boxed{5}\t5\n\\boxed{6}\t5\n"),
    ],
)
def test_the_kinds_of_files_are_those_of_training(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    verify_file(tmp_path / name, out=tmp_path / "out.jsonl", **FIELDS)
    assert [row["verdict"] for row in read_jsonl(tmp_path / "out.jsonl")] == ["correct", "wrong"]


NO_GOLDS = [float("nan"), float("-inf"), "nan", "N/A", "[]", None, " ", "\u200b", [], [None], ["1", ""], [["1"], [None]]]


@pytest.mark.parametrize("gold", [*NO_GOLDS, {"a": 1}, "Add.\n####", r"so \boxed{}", r"so \boxed{5"])
def test_what_training_refuses_is_refused_here(tmp_path, gold):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": r"\boxed{5}", "question": "2+3?", "gold": gold}])
    with pytest.raises(UserError, match=r"FILE = .*a\.jsonl, line 1: the gold in 'gold' "):
        verify_file(path, **FIELDS)
    for field in ("data.train", "evaluate.data"):
        with pytest.raises(UserError, match=rf"{field} = .*a\.jsonl, row 0: (?:the gold |has no gold answer)"):
            load_questions([path], field)


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"question": "q", "answer": r"\boxed{4}", "gold": "4", "label": "correct"}, ("answer", "gold")),  # a ledger
        ({"text": r"\boxed{4}", "gold": "4", "answer": "5"}, ("text", "gold")),
        ({"response": r"\boxed{4}", "answer": "4"}, ("response", "answer")),
        ({"completion": r"\boxed{4}", "ground_truth": 4}, ("completion", "ground_truth")),
        ({"output": r"\boxed{4}", "final_answer": "4"}, ("output", "final_answer")),
        ({"answer": r"\boxed{4}", "ground_truth": "4"}, ("answer", "ground_truth")),
    ],
)
def test_the_fields_are_found(tmp_path, row, fields):
    assert Fields.of(row, "", None, None) == Fields(*fields)
    verify_file(write_jsonl(tmp_path / "a.jsonl", [row]), out=tmp_path / "out.jsonl")
    assert read_jsonl(tmp_path / "out.jsonl")[0]["verdict"] == "correct"


def test_one_of_the_fields_may_be_named():
    row = {"answer": "4", "mine": r"\boxed{4}", "text": "?"}
    assert Fields.of(row, "", "mine", None) == Fields("mine", "answer")
    assert Fields.of(row, "", None, "mine") == Fields("text", "mine")
    with pytest.raises(UserError, match=r"FILE = here: has no field 'his' \(it has answer, mine, text\); .*--answer-field"):
        Fields.of(row, "here", "his", None)
    with pytest.raises(UserError, match=r"has no field of the usual names \(gold, .*\) \(it has text\); .*--gold-field"):
        Fields.of({"text": "?"}, "here", None, None)


def test_several_files_each_with_its_own_fields(tmp_path, capsys):
    one = write_jsonl(tmp_path / "one.jsonl", [{"response": r"\boxed{4}", "answer": "4"}])
    pq.write_table(pa.Table.from_pylist([{"answer": r"\boxed{5}", "gold": "4"}] * 2), tmp_path / "two.parquet")
    verify_file(one, tmp_path / "two.parquet", out=tmp_path / "out.jsonl")
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert [(row["file"], row["verdict"]) for row in rows] == [
        (str(one), "correct"),
        *[(str(tmp_path / "two.parquet"), "wrong")] * 2,
    ]
    assert "correct 33.33%, wrong 66.67%, unknown 0.00% of 3 answers" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"nothing\.jsonl: no such file"):
        verify_file(one, tmp_path / "nothing.jsonl")


def test_a_ledgers_verdicts_are_compared_with_the_recorded_ones(tmp_path, capsys):
    old, tokens = "strict/1 math-verify/0.8", np.ones(2, np.int32)
    labels = ("correct", "wrong", "unknown", "correct")
    answers = tuple(
        Answer(Completion(0, i, tokens, -tokens.astype(np.float32), "stop", 0, 0.0), r"\boxed{4}", Verdict(label, "", old))
        for i, label in enumerate(labels)
    )
    write_ledger(tmp_path / "a.parquet", [Group(0, 1, Prompt("q", "2+2?", "4", tokens), answers)], fates=["train"], meta={})
    verify_file(tmp_path / "a.parquet", out=tmp_path / "out.jsonl")
    printed = capsys.readouterr().out
    assert f"2 verdicts differ from the recorded ones by {old}; these are by {rules_of('strict')} (" in printed
    assert "wrong → correct: 1" in printed and "unknown → correct: 1" in printed
    assert [(row["label"], row["verdict"]) for row in read_jsonl(tmp_path / "out.jsonl")] == [
        (label, "correct") for label in labels
    ]
    verify_file(tmp_path / "a.parquet")
    assert printed.startswith(capsys.readouterr().out.rstrip()), "the same without the long columns"


def test_golds_that_are_not_matched_are_unknown_and_refused_if_many(tmp_path, capsys, caplog):
    rows = [{"text": rf"\boxed{{{i}}}", "gold": str(i)} for i in range(198)]
    rows += [{"text": r"\boxed{1}", "gold": "several\nlines"}, {"text": r"\boxed{\sqrt2/2}", "gold": r"\frac{\sqrt{2}}{2}"}]
    options = FIELDS | {"mode": "dapo", "out": tmp_path / "out.jsonl"}
    verify_file(write_jsonl(tmp_path / "a.jsonl", rows), **options)
    graded = read_jsonl(tmp_path / "out.jsonl")
    assert [(row["verdict"], row["reason"]) for row in graded[197:]] == [
        ("correct", "exact"),
        ("unknown", "unmatched gold: several lines"),
        ("wrong", "not equal"),  # as dapo judges it, which the warning says
    ]
    assert "unknown unmatched gold 1 0.50%" in " ".join(capsys.readouterr().out.split())
    assert "1 golds are not matched in every spelling under --mode dapo" in caplog.text
    with pytest.raises(
        UserError, match=r"FILE = 3 of 200 questions: .*--mode dapo \(several lines: 3\); the first is 'a\\nb' in"
    ):
        verify_file(write_jsonl(tmp_path / "a.jsonl", rows[:197] + [{"text": "x", "gold": "a\nb"}] * 3), **options)
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 200, "written all the same"


def test_the_command_line(tmp_path, command):
    path = write_jsonl(tmp_path / "answers.jsonl", [{"pred_text": "Answer: 34", "gold": "34"}])
    outcome = command("verify", path, "--answer-field", "pred_text", "--mode", "dapo", "--out", tmp_path / "out.jsonl")
    assert outcome.returncode == 0, outcome.stderr
    assert read_jsonl(tmp_path / "out.jsonl")[0]["verdict"] == "correct"


def test_a_file_can_be_graded_in_place(tmp_path):
    path = write_jsonl(tmp_path / "answers.jsonl", ROWS[:2])
    for _ in range(2):  # the second time the fields are there already
        verify_file(path, out=path, **FIELDS)
    assert [(row["id"], row["verdict"]) for row in read_jsonl(path)] == [(7, "correct"), (8, "wrong")]


BAD = [
    # (content or None, what the message names)
    (None, ("no such file", "check the path")),
    ('{"text": "a", "gold": "1"}\n\n{"text": \n', ("line 3", "not JSON", "correct that line")),
    ('["a"]\n', ("line 1", "not a JSON object")),
    ('{"text": "a", "gold": "1"}\n{"answer": "a", "gold": "1"}\n', ("line 2", "'text'", "answer, gold", "--answer-field")),
    ('{"text": "a"}\n', ("line 1", "'gold'", "--gold-field")),
    ('{"text": null, "gold": "1"}\n', ("line 1", "'text' is not text but NoneType")),
    ('{"text": "a", "gold": [1, null]}\n', ("line 1", "'gold' has a null in its list: [1, None]")),
    ('{"text": "a", "gold": null}\n', ("line 1", "the gold in 'gold' is empty")),
    ('{"text": "a", "gold": {"a": 1}}\n', ("line 1", "'gold' is neither text nor a number but dict")),
    ('{"text": "a", "gold": " "}\n', ("line 1", "'gold'")),
    ('{"text": "a", "gold": NaN}\n', ("line 1", "the gold in 'gold' is not a number", "put the correct answer there")),
    ('{"text": "a", "gold": "nan"}\n', ("line 1", "'gold' is a missing value")),
    ("\udcff\n", ("line 1", "not JSON")),
]


@pytest.mark.parametrize(("content", "named"), BAD)
def test_bad_input_names_file_line_field_and_remedy(tmp_path, content, named):
    path = tmp_path / "answers.jsonl"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as raised:
        verify_file(path, out=tmp_path / "out.jsonl", **FIELDS)
    assert all(part in str(raised.value) for part in (str(path), *named)), str(raised.value)
    assert list(tmp_path.iterdir()) == ([path] if content is not None else []), "nothing half-written is left"


def test_other_bad_input(tmp_path):
    path = write_jsonl(tmp_path / "answers.jsonl", ROWS)
    modes = "strict, math-verify, dapo, published-boxed, published-answer, program, simplerl, module:function or a URL"
    with pytest.raises(UserError, match=f"no such mode; use one of {modes}"):
        verify_file(path, **{**FIELDS, "mode": "exact"})
    (tmp_path / "answers.txt").write_text("")
    with pytest.raises(UserError, match=r"FILE = .*answers\.txt: unknown kind of file '\.txt'; use one of \.parquet"):
        verify_file(tmp_path / "answers.txt", **FIELDS)
    (tmp_path / "answers.csv").write_text("text,gold\n1,2,3\n")
    with pytest.raises(UserError, match=r"FILE = .*answers\.csv: unreadable at row 0: more values than the 2 columns"):
        verify_file(tmp_path / "answers.csv", **FIELDS)
    (tmp_path / "answers.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not readable as Parquet"):
        verify_file(tmp_path / "answers.parquet", **FIELDS)
