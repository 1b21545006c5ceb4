"""Golds at the start: matched by themselves, left out and counted, or refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from nft_megatron.base.errors import UserError
from nft_megatron.collect.build import read_prompts
from nft_megatron.config.load import config_from
from nft_megatron.data.start_table import start_table


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    characters = Tokenizer(WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    characters.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=characters)


def config_of(path: Path, golds: list[Any], **sections: Any) -> Any:
    rows = [{"question": f"What is {i}+0?", "answer": gold} for i, gold in enumerate(golds)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": [str(path)], "template": "plain", "instruction": "keep"} | sections.pop("data", {})
    tree = {"run_dir": "unused", "model": {"path": "unused"}, "train": {"num_steps": 1}, "data": data, **sections}
    return config_from(tree)


PROSE = "We add the two.\nThat makes 7."


def test_up_to_a_hundredth_is_left_out_and_counted(tmp_path: Path, tokenizer: Any, caplog: Any) -> None:
    config = config_of(tmp_path / "a.jsonl", [*range(198), PROSE, r"\frac{1}{2"])
    with caplog.at_level(logging.WARNING):
        prompts = read_prompts(config, tokenizer, "data.train")
    assert [prompt.gold for prompt in prompts.prompts] == list(map(str, range(198)))
    assert sum(prompts.unmatched.values()) == 2 and prompts.unmatched["several lines"] == 1
    assert prompts.left_out == {"questions_conflicting": 0, "questions_overlong": 0, "questions_unmatched": 2}
    assert (prompts.num_rows, prompts.num_questions) == (200, 200)
    assert "data.train: 2 golds that right answers may not match are left out (several lines: 1, " in caplog.text


def test_more_are_refused_with_the_first(tmp_path: Path, tokenizer: Any) -> None:
    config = config_of(tmp_path / "a.jsonl", [*range(197), PROSE, PROSE, PROSE], evaluate={"data": [str(tmp_path / "a.jsonl")]})
    for field in ("data.train", "evaluate.data"):
        with pytest.raises(UserError) as caught:
            read_prompts(config, tokenizer, field)
        message = str(caught.value)
        assert message.startswith(
            f"{field} = 3 of 200 questions: have a gold that right answers may not match under verify.mode=strict ("
        )
        assert f"(several lines: 3); the first is {PROSE!r} in {tmp_path / 'a.jsonl'}, row 197; name the column" in message
    assert len(read_prompts(config, tokenizer, "data.train", is_v0_1=True).prompts) == 200


def test_golds_that_the_mode_cannot_read_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    config = config_of(tmp_path / "a.jsonl", [1, 2, r"\text{}"], verify={"mode": "math-verify"})
    with pytest.raises(UserError, match=r"data\.train = 1 of 3 questions: have a gold .* under verify\.mode=math-verify"):
        read_prompts(config, tokenizer, "data.train")


def test_the_published_layout_of_gsm8k(tmp_path: Path, tokenizer: Any) -> None:
    golds = [f"Add: {i}+0=<<{i}+0={i}>>{i}\n#### {i}" for i in range(1, 4)]
    prompts = read_prompts(config_of(tmp_path / "a.jsonl", golds), tokenizer, "data.train")
    assert [prompt.gold for prompt in prompts.prompts] == ["1", "2", "3"]


def test_the_table_at_the_start(tmp_path: Path, tokenizer: Any) -> None:
    config = config_of(tmp_path / "a.jsonl", [*range(120), PROSE], data={"max_prompt_tokens": 16, "overlong": "drop"})
    (tmp_path / "a.jsonl").open("a").write(
        '{"id": "x", "question": "Twice?", "answer": 2}\n{"id": "x", "question": "Twice?", "answer": 2}\n'
        '{"question": "One or two?", "answer": 1}\n{"question": "One or two?", "answer": 2}\n'
        '{"question": "A question of many words?", "answer": 2}\n'
    )
    table = start_table(read_prompts(config, tokenizer, "data.train"), tokenizer, "data.train").splitlines()
    counts = {line.rsplit(None, 1)[0].strip(): int(line.rsplit(None, 1)[1]) for line in table[1:7]}
    assert counts == {
        "rows read": 126,
        "repeated rows": 1,
        "left out: another gold for the same question": 2,
        "left out: unmatched gold (several lines)": 1,
        "left out: too long": 1,
        "questions asked": 121,
    }
    assert table[7] == f"  tokens of a prompt: 7 to 15, mean {(10 * 13 + 90 * 14 + 20 * 15 + 7) / 121:.1f}"
    assert table[8] == "  prompt 1 (a.jsonl/0, 13 tokens, gold '0'):"
    assert [line for line in table if line.startswith("  prompt")][2] == "  prompt 3 (x, 7 tokens, gold '2'):"
