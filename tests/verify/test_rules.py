"""The version of the rules: it changes with them, and a run under other rules says so."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from verify import rules_table

from nft_megatron.base.records import Answer, Completion, Group, Prompt, Verdict
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.collect.rules import earlier_rules
from nft_megatron.config.sections import VerifyConfig
from nft_megatron.data.ledger import read_meta, read_verifiers, write_ledger
from nft_megatron.verify.modes import MODES
from nft_megatron.verify.reasons import verdict
from nft_megatron.verify.rules import other_rules, rules_of
from nft_megatron.verify.service import Verifier

# ------------------------------------------------------------------------------------------------ nobody forgets the version


@pytest.mark.parametrize("mode", rules_table.OWN_RULES)
def test_verdicts_that_change_need_a_new_version(mode):
    rows, fingerprints = rules_table.read()
    assert rules_table.changed(mode, rules_table.fingerprint(mode, rows), fingerprints) is None


def test_one_other_verdict_is_noticed(monkeypatch):
    rows, fingerprints = rules_table.read()
    last, mode = rows[-1], MODES["dapo"]
    decide = mode.decide
    strange = verdict("box too long", mode.version)
    monkeypatch.setitem(
        rules_table.MODES,
        "dapo",
        type(mode)(lambda text, gold, end: strange if (text, gold) == last else decide(text, gold, end), None, mode.version),
    )
    message = rules_table.changed("dapo", rules_table.fingerprint("dapo", rows), fingerprints)
    assert message.startswith(f"verdicts of mode dapo have changed, so {mode.version} must too: raise the number")
    assert "is new: run python" in rules_table.changed("dapo", "", {})


def test_every_verdict_names_its_rules():
    assert rules_of("strict").split()[0] == MODES["strict"].version
    assert [rules_of(mode).count("math-verify/") for mode in ("strict", "math-verify", "dapo", "simplerl")] == [1, 1, 0, 0]
    with Verifier() as verifier:
        (decided,) = verifier.verify_many([(r"\boxed{34}", "34", "stop")])
    assert other_rules([decided.verifier, rules_of("strict"), "none"], "strict") is None
    assert other_rules([rules_of("strict")], "dapo") == rules_of("strict")


# ------------------------------------------------------------------------------------------------- other rules are told


def group(number: int, verifier: str) -> Group:
    completion = Completion(number, 0, np.ones(1, np.int32), -np.ones(1, np.float32), "stop", 0, 0.0)
    answer = Answer(completion, r"\boxed{4}", Verdict("correct", "exact", verifier))
    return Group(number, 1, Prompt(str(number), "2+2?", "4", np.ones(2, np.int32)), (answer,))


def write(path: Path, *verifiers: str) -> None:
    groups = [group(number, verifier) for number, verifier in enumerate(verifiers)]
    write_ledger(path, groups, fates=["train"] * len(groups), meta={})


def test_the_newest_answers_count(tmp_path, caplog):
    folder = RunFolder(tmp_path)
    folder.make_folders()
    assert earlier_rules(folder, VerifyConfig()) is None
    write(folder.ledger(1), "strict/1")
    assert earlier_rules(folder, VerifyConfig()) == "strict/1"
    assert re.search(
        r"the answers up to step_000001 were judged by strict/1; those to come are judged by strict/\d", caplog.text
    )
    write(folder.ledger(2), rules_of("strict"), MODES["strict"].version, "none")
    assert earlier_rules(folder, VerifyConfig()) is None, "a resumed run has told it once"
    write(folder.round_part(3, 0, 0), rules_of("strict"), "strict/2 math-verify/0.9.0")
    assert earlier_rules(folder, VerifyConfig()) is not None
    assert read_verifiers(folder.round_part(3, 0, 0)) == [rules_of("strict"), "strict/2 math-verify/0.9.0"]


def judged_by(path: Path, verifier: str) -> None:
    """The same ledger, as if other rules had judged its answers."""
    table = pq.read_table(path)
    column = table.schema.get_field_index("verifier")
    pq.write_table(
        table.set_column(column, "verifier", pa.array([verifier] * len(table))),
        path,
        write_page_checksum=True,
        compression="zstd",
    )


def test_a_resumed_and_a_replayed_run_say_so_and_the_ledger_keeps_it(run_config, run_once, command, tmp_path):
    run, config = tmp_path / "run", run_config(train={"num_steps": 4}, evaluate={"data": []})
    shutil.copytree(run_once(train={"num_steps": 2}, evaluate={"data": []}), run)
    same = command("replay", run, "--step", 2)
    assert same.returncode == 0 and "rules" not in same.stdout, same.stderr
    judged_by(run / "ledger" / "step_000002.parquet", "strict/1 math-verify/0.1")
    replayed = command("replay", run, "--step", 2)
    assert replayed.returncode == 0, replayed.stderr
    assert "are by strict/1 math-verify/0.1; today's rules are " + rules_of("strict") in replayed.stdout
    assert "bit-identical" in replayed.stdout, "the recorded verdicts are trained on"

    resumed = command("train", config, "train.num_steps=3")
    assert resumed.returncode == 0, resumed.stderr
    assert "the answers up to step_000002 were judged by strict/1 math-verify/0.1" in resumed.stderr
    assert resumed.stderr.index("were judged by") < resumed.stderr.index("data.train\n") or "step 3" not in resumed.stderr
    meta = read_meta(run / "ledger" / "step_000003.parquet")
    assert (meta["rules"], meta["earlier_rules"]) == (rules_of("strict"), "strict/1 math-verify/0.1")
    again = command("train", config)
    assert again.returncode == 0 and "were judged by" not in again.stderr, again.stderr
    meta = read_meta(run / "ledger" / "step_000004.parquet")
    assert meta["rules"] == rules_of("strict") and "earlier_rules" not in meta
    graded = command("verify", run / "ledger" / "step_000002.parquet")
    assert "0 verdicts differ from the recorded ones by strict/1 math-verify/0.1" in graded.stdout, graded.stderr


def test_the_table_is_plain_text():
    content = json.loads(rules_table.TABLE.read_text())
    assert len(content["rows"]) > 150 and all(len(row) == 2 for row in content["rows"])
