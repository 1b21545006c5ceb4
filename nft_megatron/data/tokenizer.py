"""The tokenizer of a model folder, and the tokens that end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nft_megatron.base.errors import UserError
from nft_megatron.base.paths import check_model_folder
from nft_megatron.base.untrusted import read_json_object
from nft_megatron.weights.readable_config import readable_config


def load_tokenizer(folder: Path, field: str = "model.path") -> Any:
    """The folder's Hugging Face tokenizer; nothing is downloaded, and no code in the folder is run."""
    from transformers import AutoTokenizer

    check_model_folder(folder, field)
    # Without any of these, transformers 5 makes up a tokenizer that knows no words
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise UserError(field, folder, "has no tokenizer", "copy tokenizer.json and tokenizer_config.json there")
    try:
        config = readable_config(folder)
        return AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for a broken tokenizer.json
        problem = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(field, folder, f"has no usable tokenizer: {problem}", "copy the tokenizer's files there") from error


def stop_token_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The end-of-text tokens, sorted: the tokenizer's, and those of generation_config.json or, if it has none, of config.json.

    Raises :class:`UserError` with the file if it is not JSON, or names what is no token.
    """
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        ids = {_token_id(value, tokenizer, folder / name) for value in _as_list(_eos_of(folder / name))}
        if ids:
            break
    own = [token_id for token_id in _as_list(tokenizer.eos_token_id) if not _is_unknown(token_id, tokenizer)]
    return tuple(sorted(ids | set(own)))


def _eos_of(path: Path) -> Any:
    """What the file calls ``eos_token_id``, for a model with vision that of its text part; None without a file."""
    if not path.is_file():
        return None
    content = read_json_object(path, "model.path", "download it again, or delete it if config.json has eos_token_id")
    text_part = content.get("text_config")
    inner = text_part.get("eos_token_id") if isinstance(text_part, dict) else None
    return content.get("eos_token_id") if content.get("eos_token_id") is not None else inner


def _token_id(value: Any, tokenizer: Any, path: Path) -> int:
    """The id of an end-of-text token that is given as an id, or as text: a number or a token."""
    token_id = value
    if isinstance(value, str):
        token_id = int(value) if value.isdecimal() and len(value) < 10 else tokenizer.get_vocab().get(value)
    if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
        problem = f"its eos_token_id {value!r} is neither a token's id nor a token of the tokenizer"
        raise UserError("model.path", path, problem, "write the id there")
    return token_id


def _is_unknown(token_id: int, tokenizer: Any) -> bool:
    """Whether the id stands for all unknown words, because the tokenizer does not know its own end-of-text token."""
    return token_id == tokenizer.unk_token_id and tokenizer.eos_token != tokenizer.unk_token


def _as_list(value: Any) -> list[Any]:
    return [item for item in value if item is not None] if isinstance(value, list) else [] if value is None else [value]
