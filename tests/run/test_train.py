"""Whole runs of the command: they learn, resume bit for bit, and say what is wrong."""

import random
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from faults import train_dying, train_with_broken_update
from launcher import Ranks
from small_disk import enlarge
from waiting import until

from nft_megatron.data.ledger import read_groups


def generated(run_dir: Path) -> dict[int, list]:
    """Every answer of every step's ledger: tokens and log-probs, in file order."""
    return {
        int(path.stem.removeprefix("step_")): [
            (group.group_id, answer.completion.tokens.tolist(), answer.completion.logprobs.tolist(), answer.verdict.label)
            for group, _ in read_groups(path)
            for answer in group.answers
        ]
        for path in sorted((run_dir / "ledger").glob("step_*.parquet"))
    }


def test_a_run_writes_what_its_folder_promises(run_config, command, metrics_of, tmp_path):
    config = run_config(observe={"tensorboard": True}, checkpoint={"every": 2, "keep": 1})
    done = command("train", config)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert [row["step"] for row in metrics_of(run)] == [1, 2, 3]
    assert (run / "checkpoints" / "latest").read_text() == "step_000003"
    assert [folder.name for folder in (run / "checkpoints").glob("step_*")] == ["step_000003"]
    ledgers = sorted(path.name for path in (run / "ledger").glob("step_*.parquet"))
    assert ledgers == [f"step_00000{step}.parquet" for step in (1, 2, 3)]
    assert not list(run.rglob(".tmp-*")) and not list((run / "ledger" / "rounds").iterdir())
    assert list((run / "logs" / "tensorboard").iterdir())
    row = metrics_of(run)[1]
    assert row["groups_trained"] == 4 and row["updates"] == 4 and 0 < row["accuracy"] < 1
    assert sum(row["correct_rate_histogram"]) == row["groups_sampled"]
    assert "eval_accuracy_initial" in metrics_of(run)[0] and "eval_accuracy" in row
    again = command("train", config)
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in metrics_of(run)] == [1, 2, 3]


def test_export_loads_in_transformers_and_answers_the_same(run_config, run_once, command, metrics_of, tmp_path):
    run = run_once()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run / "hf" / "step_000003"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    right = 0
    questions = [(a, b) for a in range(5) for b in range(5 - a)]
    for a, b in questions:
        ids = tokenizer(f"What is {a} + {b}\n", return_tensors="pt")["input_ids"]
        answer = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        right += tokenizer.decode(answer).split()[-1] == f"\\boxed{{{a + b}}}"
    assert metrics_of(run)[-1]["eval_accuracy"] == pytest.approx(right / len(questions))
    evaluated = command("eval", folder, run_config(), "--out", tmp_path / "eval.json", "verify.mode=simplerl")
    assert f"{right / len(questions):.1%}" in evaluated.stdout


def test_the_engines_log_probs_stand_for_the_trainers_while_they_agree(run_config, command, metrics_of, tmp_path):
    """Nothing of a step is kept whose first update finds them too far apart."""
    config = run_config(train={"num_steps": 1, "old_logprobs": "engine"})
    done = command("train", config)
    assert done.returncode == 0, done.stderr
    (row,) = metrics_of(tmp_path / "run")
    assert 0 < row["mismatch_mean"] <= row["mismatch_max"] < 1e-5
    assert 0 < row["entropy"] < 5 and row["ratio_max"] > 1
    refused = command("train", config, f"run_dir={tmp_path / 'other'}", "rollout.max_mismatch=1e-12")
    assert refused.returncode == 2
    assert "rollout.max_mismatch = 1e-12: in the first mini-batch of step 1 the log-probs of engine and" in refused.stderr
    assert not list((tmp_path / "other" / "checkpoints").glob("*")) and not list((tmp_path / "other").glob("hf/*"))
    assert not (tmp_path / "other" / "metrics.jsonl").exists() or metrics_of(tmp_path / "other") == []


def test_nft_learns_the_sums(run_config, command, metrics_of, tmp_path):
    config = run_config(
        train={"num_steps": 30, "micro_batch_tokens": 1024},
        rollout={"questions_per_step": 12},
        optimizer={"learning_rate": 4e-3},
        checkpoint={"every": 100},
        evaluate={"every": 100},
    )
    done = command("train", config)
    assert done.returncode == 0, done.stderr
    rows = metrics_of(tmp_path / "run")
    assert rows[-1]["eval_accuracy"] >= rows[0]["eval_accuracy_initial"] + 0.4


def test_rft_never_forwards_a_wrong_answer(run_config, command, metrics_of, tmp_path):
    assert command("train", run_config(algorithm={"name": "rft"})).returncode == 0
    rows, ledger = metrics_of(tmp_path / "run"), generated(tmp_path / "run")
    for row in rows:
        right = sum(len(tokens) for _, tokens, _, label in ledger[row["step"]] if label == "correct")
        assert row["trained_tokens"] == right
        assert row["loss_negative"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("attempt", [0, 1, 2])
def test_killed_at_any_moment_and_resumed_equals_uninterrupted(run_config, command, metrics_of, tmp_path, attempt):
    """Four times, each when a fifth of the operations on files of a whole run, or less, has been done since the last."""
    processes = 2 if attempt == 0 else 0  # of the engine; the default is a process a core
    sections = {"rollout": {"oversample": 1.0, "processes": processes}, "train": {"num_steps": 14}, "checkpoint": {"every": 2}}
    whole, counted, moments = tmp_path / "whole", tmp_path / "counted", random.Random(attempt)
    begun = Ranks(train_dying, (str(run_config("whole", **sections)), f"{whole}/", 0, str(counted)), 1, tmp_path)
    assert begun.wait(600).returncode == 0
    num_operations = int(counted.read_text())
    config, run = run_config("killed", **sections), tmp_path / "killed"
    finished_ledgers = {}
    for _ in range(4):
        moment = int(num_operations * moments.uniform(0.02, 0.2))
        outcome = Ranks(train_dying, (str(config), f"{run}/", moment, str(counted)), 1, tmp_path).wait(600)
        assert outcome.returncode == -signal.SIGKILL, outcome.stderr
        for path, written in finished_ledgers.items():
            assert path.stat().st_mtime_ns == written, f"{path.name} was collected again"
        finished_ledgers = {path: path.stat().st_mtime_ns for path in (run / "ledger").glob("step_*.parquet")}
    assert finished_ledgers
    done = command("train", config)
    assert done.returncode == 0, done.stderr
    assert metrics_of(run) == metrics_of(tmp_path / "whole")
    assert generated(run) == generated(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == written for path, written in finished_ledgers.items())
    assert not list(run.rglob(".tmp-*"))


@pytest.mark.parametrize("name", ["stop file", "signal"])
def test_stop_request_saves_and_the_next_start_resumes(run_config, command, start, metrics_of, tmp_path, name):
    config, run = run_config(train={"num_steps": 1_000_000}, checkpoint={"every": 1000}), tmp_path / "run"
    process = start("train", config)
    until(lambda: (run / "metrics.jsonl").exists() and len(metrics_of(run)) >= 2, process=process)
    (run / "stop").touch() if name == "stop file" else process.signal(signal.SIGTERM)
    outcome = process.wait()
    assert outcome.returncode == 75, outcome.stderr
    steps = metrics_of(run)[-1]["step"]
    assert (run / "checkpoints" / "latest").read_text() == f"step_{steps:06d}"
    assert not (run / "stop").exists()
    done = command("train", config, f"train.num_steps={steps + 1}")
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics_of(run)] == list(range(1, steps + 2))


def test_a_signal_stops_all_ranks_with_everything_saved(run_config, start, metrics_of, tmp_path):
    process, run = (
        start("train", run_config(train={"num_steps": 1_000_000}, checkpoint={"every": 1000}), ranks=2),
        tmp_path / "run",
    )
    until(lambda: (run / "metrics.jsonl").exists() and metrics_of(run), process=process)
    process.signal(signal.SIGTERM)
    outcome = process.wait()
    assert [each.exitcode for each in process.processes] == [75, 75], outcome.stderr
    assert (run / "checkpoints" / "latest").read_text() == f"step_{metrics_of(run)[-1]['step']:06d}"


def test_a_corrected_config_is_accepted_after_a_wrong_start(run_config, command):
    config = run_config(train={"num_steps": 1})
    assert command("train", config, "data.max_prompt_tokens=3").returncode == 2
    assert command("train", config, "data.max_prompt_tokens=5").returncode == 0


def test_fewer_steps_than_are_done_are_refused(run_config, command, tmp_path):
    config = run_config(train={"num_steps": 2})
    assert command("train", config).returncode == 0
    fewer = command("train", config, "train.num_steps=1")
    assert fewer.returncode == 2
    assert "has already finished 2 steps" in fewer.stderr
    assert [folder.name for folder in (tmp_path / "run" / "hf").iterdir()] == ["step_000002"]


def test_a_moved_run_resumes_and_other_questions_are_refused(run_config, command, question_file, tmp_path):
    assert command("train", run_config("first", train={"num_steps": 1})).returncode == 0
    (tmp_path / "first").rename(tmp_path / "second")
    config = run_config("second", train={"num_steps": 2})
    assert command("train", config).returncode == 0
    rows = pq.read_table(question_file).to_pylist()
    rows[0]["reward_model"]["ground_truth"] = "77"
    original = question_file.read_bytes()
    try:
        pq.write_table(pa.Table.from_pylist(rows), question_file)
        other = command("train", config, "train.num_steps=3")
    finally:
        question_file.write_bytes(original)
    assert other.returncode == 2
    assert "data.train = 15 questions: are not the questions that this run started with" in other.stderr


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}, {"context": 2}, {}], ids=str)
def test_parallel_runs_train_like_one_process(run_once, metrics_of, parallel):
    sections = {"train": {"num_steps": 2}}
    runs = run_once(**sections), run_once(ranks=2, **sections, parallel=parallel)
    for one, other in zip(*map(metrics_of, runs), strict=True):
        assert other["groups_sampled"] == one["groups_sampled"] and other["trained_tokens"] == one["trained_tokens"]
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert other["entropy"] == pytest.approx(one["entropy"], rel=1e-6)
    from safetensors.torch import load_file

    files = [load_file(run / "hf" / "step_000002" / "model.safetensors") for run in runs]
    assert files[0].keys() == files[1].keys()
    for name in files[0]:
        torch.testing.assert_close(files[0][name], files[1][name], rtol=0, atol=1e-4)


def test_resume_under_another_layout(run_config, run_once, command, metrics_of, tmp_path):
    whole, config = metrics_of(run_once()), run_config("moved")
    assert command("train", config, "train.num_steps=2").returncode == 0
    done = command("train", config, "parallel.pipeline=2", ranks=2)
    assert done.returncode == 0, done.stderr
    moved = metrics_of(tmp_path / "moved")
    assert moved[2]["grad_norm"] == pytest.approx(whole[2]["grad_norm"], rel=1e-4)
    assert moved[2]["updates"] == 6


def test_a_second_process_is_kept_out(run_config, command, start, tmp_path):
    config = run_config(train={"num_steps": 1_000_000})
    process = start("train", config)
    until((tmp_path / "run" / "metrics.jsonl").exists, process=process)
    second = command("train", config)
    process.signal(signal.SIGKILL)
    assert second.returncode == 2
    assert "another process is training in it" in second.stderr


def test_changed_meaning_is_refused(run_config, command):
    config = run_config(train={"num_steps": 1})
    assert command("train", config).returncode == 0
    changed = command("train", config, "optimizer.learning_rate=1e-4")
    assert changed.returncode == 2
    assert "optimizer.learning_rate = 0.0001: the run in" in changed.stderr and "was started with 0.001" in changed.stderr


def corrupt_model(tmp_path: Path, model_folder: Path, what: str) -> Path:
    """A copy of the model without what ``what`` names."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in model_folder.iterdir():
        if not file.name.startswith(what):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_stps=3", "train.num_stps = 3: no such key; did you mean 'train.num_steps'?"),
        ("train.num_steps=soon", "train.num_steps = soon: Input should be a valid integer"),
        ("model.path=/nowhere", "model.path = /nowhere: no such folder"),
        ("data.train=/nowhere.parquet", "data.train = /nowhere.parquet: no such file"),
        ("data.max_prompt_tokens=3", "data.max_prompt_tokens = 3: 15 of 15 questions of data.train are longer"),
        ("rollout.max_answer_tokens=56", "rollout.max_answer_tokens = 56: together with data.max_prompt_tokens = 8 it exceeds"),
        ("parallel.tensor=3", "parallel.tensor = 3: does not divide"),
        ("data.train=[]", "data.train = []: is empty"),
        ("data.plain_format=x", "data.plain_format = 'x': has no {question}"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate = inf: Input should be a finite number"),
        ("train.denominator=-1", "train.denominator = -1: is not allowed; the type is tokens | sequences | number > 0"),
        ("verify.mode=simplerl", "verify.mode = simplerl: forgives a factor of 100"),
        ("run_dir=/proc/nowhere", "run_dir = /proc/nowhere: cannot be written"),
    ],
)
def test_wrong_input_ends_with_one_message(run_config, command, tmp_path, override, message):
    overrides = (
        [override] if "max_answer" not in override else [override, "train.micro_batch_tokens=256", "data.max_prompt_tokens=9"]
    )
    message = message.replace("max_prompt_tokens = 8", "max_prompt_tokens = 9")
    done = command("train", run_config(), *overrides)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("nft-megatron: ")]
    assert message in line and "; " in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_rank_0_finds_wrong_ends_every_rank_with_one_message(run_config, command):
    done = command("train", run_config(), "data.train=/nowhere.parquet", ranks=2)
    assert done.returncode == 2
    assert done.stderr.count("data.train = /nowhere.parquet: no such file") == 1


def test_a_layout_whose_packs_are_too_short_is_refused_before_any_answer(run_config, command, tmp_path):
    """15 tokens hold the longest sequence of 12, but four context ranks can only share out 8 of them."""
    done = command("train", run_config(), "train.micro_batch_tokens=15", "parallel.context=4", ranks=4)
    assert done.returncode == 2
    assert "train.micro_batch_tokens = 15: packs are multiples of 8 here" in done.stderr
    assert "raise it to at least 16" in done.stderr
    assert not list((tmp_path / "run" / "ledger").rglob("*.parquet"))


@pytest.mark.parametrize(
    ("missing", "message"),
    [("model.safetensors", "has no weights"), ("config.json", "has no config.json"), ("tokenizer", "has no tokenizer")],
)
def test_incomplete_model_folder(run_config, command, tmp_path, model_folder, missing, message):
    folder = corrupt_model(tmp_path, model_folder, missing)
    done = command("train", run_config(), f"model.path={folder}")
    assert done.returncode == 2 and f"model.path = {folder}: " in done.stderr and message in done.stderr, done.stderr


@pytest.mark.parametrize(("content", "message"), [(b"not parquet", "unreadable"), (None, "holds no questions")])
def test_unreadable_and_empty_data(run_config, command, tmp_path, content, message):
    path = tmp_path / "bad.parquet"
    if content is None:
        pq.write_table(pa.table({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())}), path)
    else:
        path.write_bytes(content)
    done = command("train", run_config(), f"data.train={path}")
    assert done.returncode == 2 and "data.train = " in done.stderr and message in done.stderr, done.stderr


def test_full_disk_loses_nothing(run_config, command, metrics_of, small_disk):
    disk = small_disk("1M")
    config = run_config(disk / "run", checkpoint={"keep": 100}, train={"num_steps": 50})
    full = command("train", config)
    assert full.returncode == 75, full.stderr
    assert "No space left" in full.stderr and "free some space" in full.stderr
    assert "Traceback" not in full.stderr
    step = int((disk / "run" / "checkpoints" / "latest").read_text().removeprefix("step_"))
    assert not list((disk / "run").rglob(".tmp-*"))
    enlarge(disk, "64M")
    done = command("train", config, f"train.num_steps={step + 2}")
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics_of(disk / "run")] == list(range(1, step + 3))


def test_a_fault_leaves_its_cause_in_the_run_folder(run_config, tmp_path):
    outcome = Ranks(train_with_broken_update, (str(run_config()),), 1, tmp_path).wait()
    assert outcome.returncode == 1
    assert "RuntimeError: the second update broke" in outcome.stderr
    assert "the second update broke" in (tmp_path / "run" / "logs" / "fault_rank0.txt").read_text()


def test_help_lists_commands_and_fields(command):
    top, train = command("--help"), command("train", "--help")
    assert all(name in top.stdout for name in ("train", "eval", "report"))
    assert "rollout.questions_per_step" not in train.stdout and "questions_per_step  (integer; default 512)" in train.stdout
    assert "Groups with both right and wrong answers" in train.stdout
