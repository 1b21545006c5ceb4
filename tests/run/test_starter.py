"""A first configuration for a model and a data file: it loads, it trains, and it says what it was told."""

import json

import pytest

from nft_megatron.config.load import load_config
from nft_megatron.run.starter import starter


def test_what_init_writes_trains(command, model_folder, question_file, metrics_of, tmp_path):
    out = tmp_path / "first.yaml"
    overrides = ["run_dir=" + str(tmp_path / "run"), "data.instruction=keep", "train.num_steps=1", "rollout.processes=0"]
    done = command("init", model_folder, question_file, "--out", out, *overrides)
    assert done.returncode == 0, done.stderr
    assert "prompt 1 (0+0" in done.stdout and f"nft-megatron train {out}" in done.stdout
    config = load_config(out)
    assert (config.data.template, config.data.instruction, config.rollout.engine) == ("plain", "keep", "embedded")
    assert config.rollout.questions_per_step == 4, "a power of two, at most half of the 15 questions"
    assert config.train.updates_per_step == 4 and config.train.num_steps == 1
    assert config.max_sequence_tokens <= 64, "the model's context"
    assert config.model.dtype == "float32"
    again = command("init", model_folder, question_file, "--out", out)
    assert again.returncode == 2 and "exists already; name another file" in again.stderr
    quick = ["rollout.max_answer_tokens=4", "rollout.questions_per_step=2", "train.updates_per_step=2"]
    done = command("train", out, *quick)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1]


def test_what_depends_on_a_given_value_follows_it(model_folder, question_file, tmp_path):
    tree = starter(model_folder, question_file, tmp_path / "a.yaml", ["rollout.questions_per_step=6", "data.instruction=keep"])
    assert tree["train"]["updates_per_step"] == 2
    assert tree["run_dir"] == "runs/a"
    tree = starter(model_folder, question_file, tmp_path / "a.yaml", ["data.max_prompt_tokens=50", "data.instruction=keep"])
    assert tree["data"]["max_prompt_tokens"] == 50 and tree["rollout"]["max_answer_tokens"] == 14


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        ([{"text": "What is 1 + 1", "answer": "2"}], [], "has no question (it has text, answer); name the column one of"),
        ([{"question": "What is 1 + 1", "answer": "2"}], ["data.answer_field=x"], "has no such column"),
        ([{"question": "What is 1 + 1", "answer": "two\nlines"}], [], "choose another verify.mode"),
        ([{"question": "What is " * 60, "answer": "2"}], ["data.instruction=keep"], ""),
    ],
)
def test_data_that_would_not_train_are_refused_before_anything_is_written(
    command, model_folder, tmp_path, rows, overrides, message
):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused = command("init", model_folder, tmp_path / "rows.jsonl", "--out", tmp_path / "out.yaml", *overrides)
    assert refused.returncode == 2 and message in refused.stderr, refused.stderr
    assert not (tmp_path / "out.yaml").exists()
