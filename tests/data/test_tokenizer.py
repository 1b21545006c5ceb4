"""The tokens that end an answer, as the files of a model folder name them."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from nft_megatron.base.errors import UserError
from nft_megatron.data.tokenizer import load_tokenizer, stop_token_ids


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"<unk>": 0, "<end>": 1, "<turn>": 2, "2": 3}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special)


@pytest.mark.parametrize(
    ("generation", "config", "stops"),
    [
        ({"eos_token_id": [2, 3]}, {"eos_token_id": 7}, (1, 2, 3)),
        ({"eos_token_id": 2}, None, (1, 2)),
        (None, {"eos_token_id": [1, 2, 3]}, (1, 2, 3)),
        ({"temperature": 0.6}, {"eos_token_id": 2}, (1, 2)),
        ({"eos_token_id": None}, {"eos_token_id": None, "text_config": {"eos_token_id": [2]}}, (1, 2)),
        (None, {"eos_token_id": "<turn>"}, (1, 2)),
        ({"eos_token_id": ["<turn>", 3]}, None, (1, 2, 3)),
        ({"eos_token_id": "2"}, None, (1, 2)),
        (None, None, (1,)),
    ],
)
def test_stop_tokens(tmp_path: Path, generation: Any, config: Any, stops: tuple[int, ...]) -> None:
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert stop_token_ids(tmp_path, tokenizer(eos_token="<end>")) == stops


def test_a_tokenizer_without_an_end_or_with_an_unknown_one(tmp_path: Path) -> None:
    assert stop_token_ids(tmp_path, tokenizer()) == ()
    unknown = tokenizer()
    unknown._special_tokens_map["eos_token"] = "<nowhere>"
    assert unknown.eos_token_id == 0
    assert stop_token_ids(tmp_path, unknown) == ()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"eos_token_id": "<nope>"}', "its eos_token_id '<nope>' is neither"),
        ('{"eos_token_id": [1, 2.5]}', "its eos_token_id 2.5 is neither"),
        ('{"eos_token_id": -1}', "its eos_token_id -1 is neither"),
        ('{"eos_token_id": true}', "its eos_token_id True is neither"),
        ('{"eos_token_id": {"a": 1}}', "its eos_token_id {'a': 1} is neither"),
    ],
)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=problem.replace("{", r"\{")) as caught:
        stop_token_ids(tmp_path, tokenizer())
    assert str(caught.value).startswith(f"model.path = {tmp_path / name}: ")


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "Unheard"}}'])
def test_a_broken_tokenizer_is_one_message(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match=r"model\.path = .*: has no usable tokenizer: "):
        load_tokenizer(tmp_path)
