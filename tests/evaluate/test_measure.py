"""``nft-megatron eval --benchmarks`` with a tiny random model: the table, and resuming after a kill."""

import json
import re
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench_data import BENCH, recorded
from own_questions import write_benchmarks
from waiting import until

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Prompt
from nft_megatron.data.ledger import read_groups, read_meta
from nft_megatron.evaluate.benchmarks import BENCHMARKS
from nft_megatron.evaluate.measure import Task, plan_parts
from nft_megatron.verify.rules import rules_of

OPTIONS = [
    "--max-answer-tokens",
    "4",
    "data.template=plain",
    'data.plain_format="What is {question}"',
    "rollout.processes=0",
    "model.dtype=float32",
]
BY_NAME = {benchmark.name: benchmark for benchmark in BENCHMARKS}


@pytest.fixture(scope="module")
def model(model_folder, tmp_path_factory) -> Path:
    """The tiny model with room for long questions: rotary positions need no other weights."""
    folder = tmp_path_factory.mktemp("long") / "tiny"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return folder


@pytest.fixture
def sums(tmp_path) -> Path:
    """Two benchmarks of sums, in name only."""
    folder = tmp_path / "sums"
    folder.mkdir()
    rows = [{"id": f"{a}+{b}", "question": f"{a} + {b}", "answer": str(a + b)} for a in range(5) for b in range(5 - a)]
    for name, kept in (("aime24", rows), ("math500", rows[:4])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return folder


def answers(out: Path) -> list[tuple]:
    return [
        (path.name, group.prompt.question_id, answer.completion.tokens.tolist(), answer.text, answer.verdict.label)
        for path in sorted((out / "answers").rglob("*.parquet"))
        for group, _ in read_groups(path)
        for answer in group.answers
    ]


def table(stdout: str) -> dict[str, list[str]]:
    """Row title → its cells."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in stdout.splitlines()]
    return {title: cells for title, *cells in rows}


def test_the_table_is_that_of_the_answers(model, sums, command, tmp_path):
    overlap = tmp_path / "overlap.jsonl"
    overlap.write_text('{"bench_id": "0+0", "overlap": 1.0}\n{"bench_id": "1+1", "overlap": 0.5}\n')
    paper = tmp_path / "paper.json"
    paper.write_text(json.dumps([{"name": "published", "scores": {benchmark.name: 12.3 for benchmark in BENCHMARKS}}]))
    out = tmp_path / "out"
    done = command(
        "eval",
        model,
        "--benchmarks",
        sums,
        *OPTIONS,
        "--out",
        out,
        "--overlap",
        overlap,
        "--beside",
        paper,
        "--grader",
        "strict",
    )
    assert done.returncode == 0, done.stderr
    assert "AIME 2024 has 15 questions, not 30" in done.stderr
    rows, summary = table(done.stdout), json.loads((out / "summary.json").read_text())

    groups = [group for path in sorted((out / "answers" / "aime24").iterdir()) for group, _ in read_groups(path)]
    assert [len(group.answers) for group in groups] == [32] * 15
    # A box ends an answer of this model.
    right = np.array(
        [
            [
                answer.completion.finish_reason == "stop" and answer.text.endswith(f"\\boxed{{{group.prompt.gold}}}")
                for answer in group.answers
            ]
            for group in groups
        ]
    )
    assert 0 < right.mean() < 1
    shares = right.mean(axis=1)
    error = shares.std(ddof=1) / np.sqrt(15)
    cells = rows["AIME 2024"]
    assert cells[:4] == ["15", "32", f"{100 * shares.mean():.1f}", f"{100 * error:.1f}"]
    assert cells[4] == f"{100 * right.any(axis=1).mean():.1f}"
    lengths = [len(answer.completion.tokens) for group in groups for answer in group.answers]
    assert cells[-1] == f"{np.mean(lengths):.0f}"
    kept = [group.prompt.question_id not in ("0+0", "1+1") for group in groups]
    assert done.stdout.count("  not in training data  ") == 2
    assert summary["not_in_training_data"]["aime24"]["avg"] == pytest.approx(shares[kept].mean())
    assert summary["not_in_training_data"]["math500"]["questions"] == 3
    assert summary["benchmarks"]["aime24"]["pass"]["1"] == pytest.approx(summary["benchmarks"]["aime24"]["avg"])
    assert summary["scores"]["aime24"] == pytest.approx(100 * shares.mean())
    mean = (summary["scores"]["aime24"] + summary["scores"]["math500"]) / 2
    assert rows["mean of 2"][0] == f"{mean:.1f}"
    assert rows["published"].count("12.3") == 7  # six benchmarks and their mean
    # AIME is asked in the training wording, MATH500 as it stands.
    assert "\\boxed{$Answer}" in groups[0].prompt.question and "0 + 0" in groups[0].prompt.question
    ((_, math_question),) = [
        (group.prompt.question_id, group.prompt.question)
        for group, _ in read_groups(out / "answers" / "math500" / "part_000000.parquet")[:1]
    ]
    assert math_question == "0 + 0"


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_answers(model, sums, start, command, tmp_path, monkeypatch):
    arguments = ["eval", model, "--benchmarks", sums, "--samples", "100", *OPTIONS, "--out"]  # 5 questions a part
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command(*arguments, whole).returncode == 0
    assert len(answers(whole)) == 19 * 100

    run = start(*arguments, broken)
    first = until(lambda: list(broken.rglob("part_*.parquet")), process=run)
    run.signal(signal.SIGKILL)
    run.wait()
    kept = {path: path.stat().st_mtime_ns for path in first}

    again = command(*arguments, broken)
    assert again.returncode == 0, again.stderr
    assert answers(broken) == answers(whole)
    assert {path: path.stat().st_mtime_ns for path in first} == kept
    assert (broken / "summary.json").read_text() == (whole / "summary.json").read_text()

    other = command(*arguments, broken, "--temperature", "0.5")
    assert other.returncode == 2
    assert "has answers with temperature = 1.0, but it is 0.5 now; restore that value, or name another folder" in other.stderr


def test_greedy_answers_need_no_benchmark_defaults(model, sums, command, tmp_path, run_config):
    """CONFIG gives prompts, lengths and seed; a word with = is an override wherever it stands."""
    config = run_config(data={"plain_format": "What is {question}"})
    out, overlap = tmp_path / "out", tmp_path / "overlap.jsonl"
    overlap.write_text('{"bench_id": "of another file", "overlap": 1.0}')
    done = command(
        "eval",
        model,
        "--benchmarks",
        sums / "math500.jsonl",
        "rollout.max_answer_tokens=3",
        "--temperature",
        "0",
        config,
        "--grader",
        "strict",
        "--out",
        out,
        "--overlap",
        overlap,
        "seed=7",
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["sampling"]["max_tokens"], summary["sampling"]["temperature"], summary["seed"]) == (3, 0.0, 7)
    assert summary["grader"] == "strict"
    assert "mean of 1" in done.stdout
    assert "overlap.jsonl: none of its questions are in these benchmarks" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no questions to measure it on; add --benchmarks"),
        (["--benchmarks", "missing"], "--benchmarks = missing: no such file or folder"),
        (["--benchmarks", "{sums}", "--grader", "oracle"], "oracle"),
        (["--benchmarks", "{sums}", "--samples", "0"], "--samples = 0"),
        (["--benchmarks", "{sums}", "--beside", "{sums}/aime24.jsonl"], "--beside = {sums}/aime24.jsonl: holds no scores"),
        (["--benchmarks", "{sums}", "--top-p", "2"], "top_p = 2.0: is not in (0, 1]"),
    ],
)
def test_mistakes(model, sums, command, arguments, message):
    done = command("eval", model, *[word.format(sums=sums) for word in arguments], "rollout.processes=0")
    assert done.returncode == 2, done.stderr
    assert message.format(sums=sums) in done.stderr
    assert "Traceback" not in done.stderr


def write_golds(path: Path, golds: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": f"q{i}", "question": "1", "answer": g}) + "\n" for i, g in enumerate(golds)))
    return path


def test_golds_that_are_not_matched_are_asked_and_named(model, command, tmp_path):
    """A text of two lines is matched by nothing, and dapo reads no other spelling of a root."""
    path = write_golds(tmp_path / "math500.jsonl", [*map(str, range(98)), "a\nb", r"\frac{\sqrt{2}}{2}"])
    options = [*OPTIONS, "--grader", "dapo", "--samples", "1", "--out", tmp_path / "out"]
    done = command("eval", model, "--benchmarks", path, *options)
    assert done.returncode == 0, done.stderr
    assert "MATH500: right answers may not match 2 of 100 golds under --grader dapo and then count as wrong (" in done.stderr
    assert table(done.stdout)["MATH500"][0] == "100"
    assert "math500 includes 2 questions whose gold right answers may not match" in done.stdout
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["unmatched_golds"] == {
        "math500": {"q98": "several lines", "q99": "not equal, respelled"}
    }


def test_more_golds_that_nothing_matches_are_refused(model, command, tmp_path):
    path = write_golds(tmp_path / "math500.jsonl", [*map(str, range(97)), "a\nb", "c\nd"])
    done = command("eval", model, "--benchmarks", path, *OPTIONS, "--out", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert (
        r"--benchmarks (MATH500) = 2 of 99 questions: have a gold that right answers may not match under --grader simplerl "
        r"(several lines: 2); the first is 'a\nb' in q97; choose another --grader"
    ) in " ".join(done.stderr.split())


REASONS = ("exact", "another number", "not a number", "no closed box", "truncated", "several answers")


def reasons(stdout: str, column: int = 0) -> dict[str, int]:
    """The printed counts, by reason."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in stdout.splitlines()]
    return {row[0].partition(": ")[2]: int(row[1 + column]) for row in rows if row[0].partition(": ")[2] in REASONS}


def test_held_out_questions_of_a_config_keep_every_answer_with_its_reason(model, run_config, command, tmp_path):
    config = run_config(evaluate={"samples": 3, "temperature": 1.0})
    for out, summary, kept in (
        (tmp_path / "out", tmp_path / "out" / "summary.json", tmp_path / "out" / "answers.parquet"),
        (tmp_path / "one.json", tmp_path / "one.json", tmp_path / "one.parquet"),
    ):
        done = command("eval", model, config, "--out", out)
        assert done.returncode == 0, done.stderr
        groups = [group for group, _ in read_groups(kept)]
        assert [len(group.answers) for group in groups] == [3] * 15
        assert {group.prompt.question_id for group in groups} == {f"{a}+{b}" for a in range(5) for b in range(5 - a)}
        labels = [answer.verdict.label for group in groups for answer in group.answers]
        written = json.loads(summary.read_text())
        assert written["accuracy"] == pytest.approx(labels.count("correct") / 45)
        counts = Counter(answer.verdict.reason for group in groups for answer in group.answers)
        assert reasons(done.stdout) == written["reasons"] == counts and counts.total() == 45
        assert written["verifier"].startswith("strict/") and str(kept) in done.stdout
    graded = command("verify", tmp_path / "one.parquet", kept)
    assert graded.returncode == 0, graded.stderr
    assert "of 90 answers" in graded.stdout and "0 verdicts differ from the recorded ones" in graded.stdout


def test_any_file_with_any_prompt(model, sums, command, tmp_path):
    """A file of another name, asked as it stands; then for a box, as DAPO does; and a config's own prompt around it."""
    mine = sums / "my sums.jsonl"
    (sums / "math500.jsonl").rename(mine)
    asked = {}
    for name, options in (("plain", []), ("boxed", ["--instruction", "boxed"]), ("answer", ["--instruction", "answer"])):
        out = tmp_path / name
        done = command("eval", model, "--benchmarks", mine, *OPTIONS, *options, "--grader", "strict", "--out", out)
        assert done.returncode == 0, done.stderr
        assert "questions, not" not in done.stderr
        groups = [group for group, _ in read_groups(out / "answers" / "my_sums" / "part_000000.parquet")]
        assert [len(group.answers) for group in groups] == [1] * 4
        asked[name] = groups[0].prompt.question
        summary = json.loads((out / "summary.json").read_text())
        assert table(done.stdout)["my sums"][:2] == ["4", "1"]
        assert reasons(done.stdout) == summary["benchmarks"]["my_sums"]["reasons"]
        assert sum(reasons(done.stdout).values()) == 4
    assert asked["plain"] == "0 + 0"
    assert "\\boxed{$Answer}" in asked["boxed"] and "0 + 0" in asked["boxed"]
    assert "Answer: $Answer (without quotes)" in asked["answer"]
    beside = command("eval", model, "--benchmarks", mine, *OPTIONS, "--out", out / "again", "--beside", out / "summary.json")
    assert re.search(r"^avg@k .* Minerva Math +my_sums +mean$", beside.stdout, re.MULTILINE), "a column of its own"
    assert command("eval", model, "--benchmarks", sums / "my sums.jsonl", *OPTIONS, "--instruction", "oral").returncode == 2


def test_beside_evaluations_with_other_seeds_and_settings(model, sums, command, tmp_path):
    """Two seeds are one model, with twice the answers to each question; another temperature is compared with both."""

    def measure(name: str, *options: object) -> tuple[str, dict]:
        arguments = ["--benchmarks", sums, "--samples", "4", *OPTIONS, "--grader", "strict", "--out", tmp_path / name]
        done = command("eval", model, *arguments, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads((tmp_path / name / "summary.json").read_text())

    def rights(name: str, benchmark: str) -> dict[str, int]:
        groups = [group for path in (tmp_path / name / "answers" / benchmark).iterdir() for group, _ in read_groups(path)]
        return {g.prompt.question_id: [a.verdict.label for a in g.answers].count("correct") for g in groups}

    _, first = measure("a", "seed=1")
    assert "beside" not in first
    assert {name: own["right"] for name, own in first["by_question"].items()} == {
        name: {question: f"{right}/4" for question, right in rights("a", name).items()} for name in ("aime24", "math500")
    }
    printed, second = measure("b", "seed=2", "--beside", tmp_path / "a" / "summary.json")
    assert second["beside"]["models"] == []
    scores = [first["scores"]["aime24"], second["scores"]["aime24"]]
    assert scores[0] != scores[1]
    assert second["beside"]["deviation_between_seeds"][str(model)]["aime24"] == pytest.approx(np.std(scores, ddof=1))
    both = {question: rights("a", "aime24")[question] + right for question, right in rights("b", "aime24").items()}
    shares = np.array(list(both.values())) / 8
    mean, error = 100 * shares.mean(), 100 * shares.std(ddof=1) / np.sqrt(15)
    assert re.search(rf"  2, 1 +{mean:.1f} ± {error:.1f}  ", printed)

    files = [tmp_path / name / "summary.json" for name in "ab"]
    printed, third = measure("c", "seed=3", "--temperature", "0.3", "--beside", *files)
    (other,) = third["beside"]["models"]
    assert (other["seeds"], other["other_seeds"], other["differing"]) == ([3], [1, 2], ["temperature 0.3 and 1.0"])
    change = np.array([right / 4 - both[question] / 8 for question, right in rights("c", "aime24").items()])
    found = other["differences"]["aime24"]
    assert found["difference"] == pytest.approx(change.mean())
    assert found["standard_error"] == pytest.approx(change.std(ddof=1) / np.sqrt(15))
    assert (found["only_first"], found["only_second"]) == ((change > 0).sum(), (change < 0).sum())
    assert other["differences"]["mean"]["questions"] == 19
    row = re.search(r"on the same questions, in points; temperature 0.3 and 1.0\n.*\nAIME 2024 +15 +(\S+) ", printed)
    assert row and row[1] == f"{100 * change.mean():+.1f}"


def test_answers_judged_by_other_rules_are_not_mixed_with_new_ones(model, sums, command, tmp_path):
    arguments = ["eval", model, "--benchmarks", sums / "math500.jsonl", *OPTIONS, "--grader", "dapo", "--out", tmp_path / "out"]
    assert command(*arguments).returncode == 0
    (path,) = (tmp_path / "out" / "answers" / "math500").iterdir()
    assert read_meta(path)["settings"]["rules"] == rules_of("dapo")
    metadata = pq.read_schema(path).metadata
    meta = json.loads(metadata[b"nft_megatron.meta"])
    written = pq.read_table(path)
    for settings, verifier, code in (
        ({"rules": "dapo/1"}, "dapo/1", 2),
        ({"rules": None}, "dapo/1", 2),  # as earlier versions wrote it
        ({"rules": None}, rules_of("dapo"), 0),
    ):
        settings = {key: value for key, value in (meta["settings"] | settings).items() if value is not None}
        column = written.schema.get_field_index("verifier")
        changed = written.set_column(column, "verifier", pa.array([verifier] * len(written)))
        packed = {**metadata, b"nft_megatron.meta": json.dumps({"settings": settings}).encode()}
        pq.write_table(changed.replace_schema_metadata(packed), path, write_page_checksum=True)
        done = command(*arguments)
        assert done.returncode == code, done.stderr
        assert code == 0 or f"has answers with rules = dapo/1, but it is {rules_of('dapo')} now" in done.stderr


def prompts(*lengths: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(f"q{i}", "?", "1", np.zeros(length, np.int32)) for i, length in enumerate(lengths))


def test_parts_hold_neighbours_with_the_same_room(tmp_path):
    task = Task(BY_NAME["amc23"], prompts(5, 6, 95, 5, 5, 5, 5), samples=200)  # two questions a part
    parts = plan_parts(task, max_tokens=10, context=100, folder=tmp_path)
    assert [(part.first, part.stop, part.max_tokens) for part in parts] == [(0, 2, 10), (2, 3, 5), (3, 5, 10), (5, 7, 10)]
    assert len({part.path for part in parts}) == 4
    many = plan_parts(Task(BY_NAME["amc23"], prompts(5, 5), samples=1000), max_tokens=10, context=100, folder=tmp_path)
    assert [(part.first, part.stop) for part in many] == [(0, 1), (1, 2)]
    with pytest.raises(UserError, match=r"--benchmarks = q1: has 100 tokens, but the model's context is 100"):
        plan_parts(Task(BY_NAME["amc23"], prompts(5, 100), samples=1), max_tokens=10, context=100, folder=tmp_path)


def measure_all_six(paths, model, command, out):
    """The grader is the one without algebra: here the point is the table, for 1547 questions."""
    done = command("eval", model, "--benchmarks", *paths, *OPTIONS, "--samples", "1", "--grader", "dapo", "--out", out)
    assert done.returncode == 0, done.stderr
    rows = table(done.stdout)
    for benchmark in BENCHMARKS:
        assert rows[benchmark.title][:2] == [str(benchmark.num_questions), "1"]
    assert "mean of 6" in rows
    assert "not 30" not in done.stderr
    assert len(answers(out)) == sum(benchmark.num_questions for benchmark in BENCHMARKS)
    return rows, done.stderr


def test_all_six_benchmarks(model, command, tmp_path):
    """Of own questions; the model's answers are a box or none, so that the share of right ones is that of equal texts."""
    written = write_benchmarks(tmp_path / "benchmarks")
    rows, messages = measure_all_six([tmp_path / "benchmarks"], model, command, tmp_path / "out")
    assert "questions: have a gold" not in messages
    num_right = 0
    for benchmark in BENCHMARKS:
        golds = {question_id: gold for question_id, _, gold in written[benchmark.name][1]}
        given = [
            (group.prompt.question_id, answer)
            for path in sorted((tmp_path / "out" / "answers" / benchmark.name).iterdir())
            for group, _ in read_groups(path)
            for answer in group.answers
        ]
        assert [question_id for question_id, _ in given] == list(golds)
        right = [
            answer.completion.finish_reason == "stop" and f"\\boxed{{{golds[question_id].lstrip('0') or '0'}}}" in answer.text
            for question_id, answer in given
        ]
        assert rows[benchmark.title][2] == f"{100 * sum(right) / len(right):.1f}"
        num_right += sum(right)
    assert num_right > 0


@recorded(*(f"{benchmark.name}.jsonl" for benchmark in BENCHMARKS))
def test_all_six_recorded_benchmarks(model, command, tmp_path):
    measure_all_six([BENCH / f"{benchmark.name}.jsonl" for benchmark in BENCHMARKS], model, command, tmp_path / "out")
