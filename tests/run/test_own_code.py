"""Whole runs with a user's own loss and own verifier, from the docs, on one process and two."""

import re
import sys
from pathlib import Path

import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.data.ledger import read_groups, read_verifiers
from nft_megatron.run.own_source import keep_source
from nft_megatron.verify.rules import rules_of

DOCS = Path(__file__).parents[2] / "docs"
GRADER = '''
def grade(answer, gold, question):
    """Boxed sums, and odd ones out: 4 is for nobody to judge."""
    a, b = (int(word) for word in question.removeprefix("What is ").split(" + "))
    return None if gold == "4" else answer.strip() == "\\\\boxed{%d}" % (a + b)
'''


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder whose modules this process and those it starts can import."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    (code,) = re.findall(r"```python\n# my_losses.py\n(.*?)```", (DOCS / "new_algorithm.md").read_text(), re.DOTALL)
    (folder / "my_losses.py").write_text(code)
    (folder / "sum_grader.py").write_text(GRADER)
    return folder


def test_a_run_with_ones_own_loss_and_verifier(run_config, command, metrics_of, modules, tmp_path):
    sections = {
        "algorithm": {"name": "my_losses:TOPR", "negative_weight": 0.5},
        "verify": {"mode": "sum_grader:grade", "workers": 1, "hard_seconds": 120.0},
    }
    config = run_config(train={"num_steps": 2, "denominator": "sequences"}, evaluate={"data": []}, **sections)
    done = command("train", config)
    assert done.returncode == 0, done.stderr
    run = RunFolder(tmp_path / "run")
    row = metrics_of(run.root)[1]
    assert row["updates"] == 4 and row["grad_norm"] > 0
    assert row["verdict/accepted"] + row["verdict/rejected"] + row.get("verdict/undecided", 0) + row.get(
        "verdict/truncated", 0
    ) == pytest.approx(1)
    assert read_verifiers(run.ledger(1)) == [rules_of("sum_grader:grade")]
    for group, _ in read_groups(run.ledger(1)):
        for answer in group.answers:
            expected = "correct" if answer.text.strip() == f"\\boxed{{{group.prompt.gold}}}" else "wrong"
            assert answer.verdict.label == ("unknown" if group.prompt.gold == "4" else expected)
    replayed = command("replay", run.root, "--step", "1", ranks=2)
    assert replayed.returncode == 0 and "my_losses:TOPR, 2 processes" in replayed.stdout, replayed.stderr
    assert float(replayed.stdout.rsplit("largest relative difference: ")[-1].split()[0]) < 1e-3

    more = "train.num_steps=3"
    (modules / "my_losses.py").write_text((modules / "my_losses.py").read_text() + "# edited\n")
    refused = command("train", config, more)
    assert refused.returncode == 2 and "restore the source, or begin a new run" in refused.stderr
    (modules / "my_losses.py").write_text((modules / "my_losses.py").read_text().removesuffix("# edited\n"))
    (modules / "sum_grader.py").write_text(GRADER + "# edited\n")
    refused = command("train", config, more)
    flag = f"verify.accept_rules={rules_of('sum_grader:grade')}"
    assert refused.returncode == 2 and f"or continue with {flag}" in refused.stderr
    done = command("train", config, more, flag)
    assert done.returncode == 0, done.stderr
    assert "were judged by sum_grader:grade/" in done.stderr
    assert read_verifiers(run.ledger(3)) == [rules_of("sum_grader:grade")]


def test_a_run_whose_verifier_cannot_be_loaded_does_not_begin(run_config, command, modules, tmp_path):
    (modules / "sum_grader.py").write_text("import nothing_like_it")
    refused = command("train", run_config(verify={"mode": "sum_grader:grade"}))
    assert refused.returncode == 2
    assert "verify.mode = sum_grader:grade: cannot be imported: ModuleNotFoundError" in refused.stderr
    assert not list(RunFolder(tmp_path / "run").ledgers.rglob("*.parquet"))


def test_a_run_keeps_to_its_source(modules, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    keep_source(folder, "nft")
    assert not folder.algorithm.exists()
    keep_source(folder, "my_losses:TOPR")
    begun = folder.algorithm.read_text()
    (modules / "my_losses.py").write_text("# another")
    keep_source(folder, "my_losses:TOPR")
    assert folder.algorithm.read_text() != begun, "nothing has been computed yet"
    monkeypatch.setattr(RunFolder, "has_begun", True)
    keep_source(folder, "my_losses:TOPR")
    (modules / "my_losses.py").write_text("# a third")
    with pytest.raises(UserError, match=r"was started with the source my_losses:TOPR/\w{12}; it is my_losses:TOPR/\w{12} now"):
        keep_source(folder, "my_losses:TOPR")
    sys.modules.pop("my_losses", None)
