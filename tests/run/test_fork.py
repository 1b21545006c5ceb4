"""A new run from another one's step: it continues what it is told to, with another meaning, and needs nothing of the other."""

import json
import shutil

import pytest

from nft_megatron.base.run_folder import RunFolder
from nft_megatron.data.ledger import read_groups


def asked(run, step):
    return [group.group_id for group, _ in read_groups(RunFolder(run).ledger(step))]


@pytest.fixture
def source(run_once, tmp_path):
    """A finished run of three steps, with all its checkpoints, that a test may delete."""
    shutil.copytree(run_once(checkpoint={"every": 1, "keep": 3}), tmp_path / "source")
    return tmp_path / "source"


def test_without_a_change_a_fork_trains_what_the_run_trained(source, command, metrics_of, tmp_path):
    """Same weights, optimizer, order of questions and step: the rows after the fork are the run's, bit for bit."""
    new = tmp_path / "new"
    done = command("fork", source, new, "--step", "1")
    assert done.returncode == 0, done.stderr
    assert f"{new} begins after step 1 of {source}\n" in done.stdout
    rows = metrics_of(source)
    shutil.rmtree(source)
    done = command("train", new / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert metrics_of(new) == rows[1:]
    assert json.loads((new / "fork.json").read_text()) == {"run": str(source), "step": 1, "changed": {}}
    assert command("report", new).returncode == 0


def test_a_fork_changes_the_meaning_of_a_run(source, command, metrics_of, tmp_path):
    new = tmp_path / "new"
    before = sorted(path.relative_to(source) for path in source.rglob("*"))
    done = command("fork", source, new, "algorithm.name=grpo", "optimizer.learning_rate=2e-3", "train.num_steps=4")
    assert done.returncode == 0, done.stderr
    assert "  optimizer.learning_rate: 0.001 → 0.002\n" in done.stdout
    assert sorted(path.relative_to(source) for path in source.rglob("*")) == before
    changed = json.loads((new / "fork.json").read_text())["changed"]
    assert changed["algorithm.name"] == ["nft", "grpo"] and changed["train.num_steps"] == [3, 4]
    assert changed["algorithm.epsilon"] == [1.0, None]
    done = command("train", new / "config.yaml")
    assert done.returncode == 0, done.stderr
    (row,) = metrics_of(new)
    assert (row["step"], row["learning_rate"]) == (4, 2e-3)
    assert min(asked(new, 4)) > max(asked(new.parent / "source", 3)), "the order of questions goes on"
    refused = command("train", new / "config.yaml", "algorithm.name=nft")
    assert refused.returncode == 2 and "algorithm" in refused.stderr, "from now on it is a run like any other"


def test_with_other_questions_the_order_begins_anew(source, command, tmp_path):
    new = tmp_path / "new"
    done = command("fork", source, new, "--step", "2", "seed=5")
    assert done.returncode == 0 and "with its questions from the beginning" in done.stdout, done.stderr
    assert not (RunFolder(new).checkpoint(2) / "collector.parquet").exists()
    done = command("train", new / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert min(asked(new, 3)) < 8 <= min(asked(source, 3))


def test_what_cannot_be_forked(source, command, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    cases = {
        (source, tmp_path / "new", "--step", "7"): "--step = 7: has no checkpoint; one of 1, 2, 3;",
        (source, tmp_path / "full", "--step", "2"): "is not empty; name a folder that does not exist yet",
        (source, source / "inner", "--step", "2"): f"lies in the run {source}; name a folder of its own",
        (source, tmp_path / "new"): "train.num_steps = 3: the new run begins after step 3; set train.num_steps to more than 3",
        (source, tmp_path / "new", "--step", "2", "train.num_stps=9"): "train.num_stps = 9: no such key",
        (tmp_path / "full", tmp_path / "new"): "is not a run folder: it has no config.yaml",
    }
    for words, message in cases.items():
        refused = command("fork", *words)
        assert refused.returncode == 2 and message in refused.stderr, (words, refused.stderr)
        assert not (tmp_path / "new").exists()
