"""A run asks what it began with, whatever the date, the template or the rules of reading have become since."""

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from nft_megatron.base.errors import UserError
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.config.load import config_from, dump_config
from nft_megatron.config.schema import Config
from nft_megatron.data.kept_prompts import KeptPrompts
from nft_megatron.data.prompts import PromptSet
from nft_megatron.data.wording import worded
from nft_megatron.run.questions import read_questions

DATED = "<{{ strftime_now('%d %b %Y') }}>{% for m in messages %}{{ m.content }}{% endfor %}"


def tokenizer(template: str = DATED) -> PreTrainedTokenizerFast:
    characters = Tokenizer(WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    characters.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=characters, chat_template=template)


def texts(prompts: PromptSet) -> list[str]:
    return ["".join(map(chr, prompt.tokens)) for prompt in prompts.prompts]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for name, rows in (("train", [("1+1?", 2), ("2+2?", 4)]), ("held", [("3+3?", 6)])):
        lines = (json.dumps({"question": text, "answer": gold}) for text, gold in rows)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    tree: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": "unused"},
        "data": {"train": [str(tmp_path / "train.jsonl")], "instruction": "keep"},
        "evaluate": {"data": [str(tmp_path / "held.jsonl")]},
        "train": {"num_steps": 1},
    }
    return config_from(tree)


@pytest.fixture
def folder(config: Config) -> RunFolder:
    folder = RunFolder(config.run_dir)
    folder.root.mkdir()
    folder.make_folders()
    folder.config.write_text(dump_config(config))
    return folder


def boxed(config: Config) -> Config:
    return config_from(config.model_dump(mode="json"), ["data.instruction=boxed"])


def as_v0_1_left_it(folder: RunFolder, config: Config) -> None:
    """A ledger, no prompts, and a configuration without the fields that came later."""
    tree = config.model_dump(mode="json")
    for name in ("question_field", "answer_field", "config_name", "chat_template_kwargs"):
        del tree["data"][name]
    folder.config.write_text(yaml.safe_dump(tree))
    folder.ledger(1).touch()


def begin(folder: RunFolder, days_ago: int = 0) -> None:
    """As if the run had collected a step, and ``days_ago``."""
    folder.ledger(1).touch()
    kept = KeptPrompts.read(folder.prompts)
    assert kept
    if days_ago:
        KeptPrompts(kept.prompts, kept.started - timedelta(days_ago), kept.digest).write(folder.prompts)


def test_a_run_keeps_its_prompts_and_its_date(config: Config, folder: RunFolder, capsys: Any) -> None:
    first, _ = read_questions(config, folder, tokenizer())
    begin(folder, days_ago=40)
    date = f"{datetime.now() - timedelta(40):%d %b %Y}"
    capsys.readouterr()
    again, held_out = read_questions(config, folder, tokenizer("another: {{ messages[0].content }}"))
    assert texts(again) == texts(first)
    assert [(p.question_id, p.question, p.gold) for p in again.prompts] == [
        ("train.jsonl/0", "1+1?", "2"),
        ("train.jsonl/1", "2+2?", "4"),
    ]
    assert again.num_rows == 2 and again.left_out == first.left_out
    _, held_out = read_questions(config, folder, tokenizer())
    assert texts(held_out) == [f"<{date}>3+3?"]
    assert "rows read" in capsys.readouterr().err


def test_a_run_that_collected_nothing_reads_again(config: Config, folder: RunFolder) -> None:
    read_questions(config, folder, tokenizer())
    again, _ = read_questions(config, folder, tokenizer("{{ messages[0].content }}"))
    assert texts(again) == ["1+1?", "2+2?"]


def test_other_files_are_read_with_the_old_date_for_the_collector_to_refuse(config: Config, folder: RunFolder) -> None:
    read_questions(config, folder, tokenizer())
    begin(folder, days_ago=40)
    kept = folder.prompts.read_bytes()
    (path,) = config.data.train
    path.write_text(json.dumps({"question": "5+5?", "answer": "10"}))
    other, _ = read_questions(config, folder, tokenizer())
    assert texts(other) == [f"<{datetime.now() - timedelta(40):%d %b %Y}>5+5?"]
    assert folder.prompts.read_bytes() == kept


def test_a_run_of_version_0_1_is_never_asked_for_a_box(config: Config, folder: RunFolder) -> None:
    """Neither its training nor its held-out questions, nor at later starts, when its folder has been brought up to date."""
    config = boxed(config)
    as_v0_1_left_it(folder, config)
    for _ in range(3):
        questions, held_out = read_questions(config, folder, tokenizer("{{ messages[0].content }}"))
        assert (texts(questions), texts(held_out)) == (["1+1?", "2+2?"], ["3+3?"])
        folder.config.write_text(dump_config(config))
    other = RunFolder(folder.root.parent / "other")
    questions, held_out = read_questions(config, other, tokenizer("{{ messages[0].content }}"))
    assert texts(questions) == [worded("1+1?", "boxed"), worded("2+2?", "boxed")] and texts(held_out) == [
        worded("3+3?", "boxed")
    ]


def test_lost_prompts_are_made_anew_by_the_rules_of_the_run(config: Config, folder: RunFolder) -> None:
    first, _ = read_questions(boxed(config), folder, tokenizer("{{ messages[0].content }}"))
    begin(folder)
    folder.prompts.unlink()
    again, _ = read_questions(boxed(config), folder, tokenizer("{{ messages[0].content }}"))
    assert texts(again) == texts(first) == [worded("1+1?", "boxed"), worded("2+2?", "boxed")]


def test_a_run_of_version_0_1_leaves_no_golds_out(config: Config, folder: RunFolder) -> None:
    (path,) = config.data.train
    path.write_text(json.dumps({"question": "1+1?", "answer": "One and one.\nTwo."}))
    with pytest.raises(UserError, match="right answers may not match"):
        read_questions(config, folder, tokenizer())
    as_v0_1_left_it(folder, config)
    questions, _ = read_questions(config, folder, tokenizer())
    assert [prompt.gold for prompt in questions.prompts] == ["One and one.\nTwo."]
    again, _ = read_questions(config, folder, tokenizer("0 {{ messages[0].content }}"))
    assert texts(again) == texts(questions)


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"PAR1"), lambda path: path.write_bytes(b"")])
def test_damaged_prompts_are_named(config: Config, folder: RunFolder, damage: Any) -> None:
    read_questions(config, folder, tokenizer())
    begin(folder)
    damage(folder.prompts)
    with pytest.raises(UserError, match=r"run_dir = .*prompts\.parquet: is damaged: .*; restore it, or delete it"):
        read_questions(config, folder, tokenizer())
