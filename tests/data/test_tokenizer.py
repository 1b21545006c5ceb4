"""The tokens that end an answer, as the files of a model folder name them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from nft_megatron.base.errors import UserError
from nft_megatron.data.tokenizer import load_tokenizer, stop_token_ids
from nft_megatron.rollout.model import CausalModel


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


def test_a_model_folder_whose_end_of_text_token_is_text(model_folder: Path, tmp_path: Path) -> None:
    """transformers 5 refuses such a config.json, both for the tokenizer and for the model."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "generation_config.json").unlink()
    tree = json.loads((folder / "config.json").read_text())
    vocabulary = load_tokenizer(model_folder).get_vocab()
    words = sorted(vocabulary, key=lambda word: vocabulary[word])[2:4]
    for eos in (words[0], [words[0], 3], "2"):
        (folder / "config.json").write_text(json.dumps(tree | {"eos_token_id": eos}))
        known = load_tokenizer(folder)
        assert known.get_vocab() == vocabulary
        own = {known.eos_token_id} - {None}
        assert set(stop_token_ids(folder, known)) == own | ({2, 3} if isinstance(eos, list) else {2})
        assert CausalModel(folder, torch.float32).vocab_size == tree["vocab_size"]


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
