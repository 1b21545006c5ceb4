"""Whole runs of every algorithm: they train on the questions that their papers train on, and on one layout like on another."""

import pytest

from nft_megatron.data.ledger import read_groups

BUDGET = {"train": {"num_steps": 2, "updates_per_step": 2, "micro_batch_tokens": 128}, "evaluate": {"data": []}}


def trained_groups(run):
    ledgers = sorted((run / "ledger").glob("step_*.parquet"))
    return [[group for group, fate in read_groups(path) if fate == "train"] for path in ledgers]


@pytest.mark.parametrize("name", ["nft", "rft", "dapo", "infonca", "cispo"])
def test_mixed_questions_alone_where_the_loss_needs_them(run_config, command, metrics_of, tmp_path, name):
    done = command("train", run_config(algorithm={"name": name}, **BUDGET))
    assert done.returncode == 0, done.stderr
    for row, groups in zip(metrics_of(tmp_path / "run"), trained_groups(tmp_path / "run"), strict=True):
        assert len(groups) == 4 and all(group.is_mixed for group in groups)
        assert row["grad_norm"] > 0 and row["skipped_updates"] == 0


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "gspo"])
def test_all_questions_where_nothing_is_filtered(run_config, command, metrics_of, tmp_path, name):
    """As in appendix B.2.4: as many as asked, mixed or not; those on which all answers agree have no token to forward."""
    sections = BUDGET | {"rollout": {"questions_per_step": 10}}
    done = command("train", run_config(algorithm={"name": name}, **sections))
    assert done.returncode == 0, done.stderr
    rows, steps = metrics_of(tmp_path / "run"), trained_groups(tmp_path / "run")
    for row, groups in zip(rows, steps, strict=True):
        assert len(groups) == row["groups_sampled"] == row["groups_trained"] == 10
        mixed = [answer for group in groups if group.is_mixed for answer in group.answers]
        assert row["trained_tokens"] == sum(len(answer.completion.tokens) for answer in mixed)
    assert any(not group.is_mixed for groups in steps for group in groups), "or the test shows nothing"
    again = command("train", run_config("filtered", algorithm={"name": name}, **BUDGET, rollout={"prompt_filter": True}))
    assert again.returncode == 0, again.stderr
    assert all(group.is_mixed for groups in trained_groups(tmp_path / "filtered") for group in groups)


def test_a_step_whose_questions_teach_nothing_is_survived(run_config, command, metrics_of, tmp_path):
    """One question a step: where its answers all agree, no token is forwarded, and the weights move by decay alone."""
    sections = {
        "rollout": {"questions_per_step": 1, "group_size": 2},
        "train": {"num_steps": 6, "updates_per_step": 1},
        "evaluate": {"data": []},
        "checkpoint": {"every": 100},
    }
    done = command("train", run_config(algorithm={"name": "dr_grpo"}, **sections))
    assert done.returncode == 0, done.stderr
    empty = [row for row in metrics_of(tmp_path / "run") if row["trained_tokens"] == 0]
    assert 0 < len(empty) < 6
    assert all(row["loss"] == row["grad_norm"] == row["entropy"] == row["kl_old"] == 0 for row in empty)
