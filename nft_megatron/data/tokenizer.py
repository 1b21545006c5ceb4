"""The tokenizer of a model folder, and the tokens that end an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nft_megatron.base.errors import UserError


def load_tokenizer(folder: Path, field: str = "model.path") -> Any:
    """The folder's Hugging Face tokenizer; nothing is downloaded, and no code in the folder is run."""
    from transformers import AutoTokenizer

    # Without any of these, transformers 5 makes up a tokenizer that knows no words
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise UserError(field, folder, "has no tokenizer", "copy tokenizer.json and tokenizer_config.json there")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        problem = str(error).strip().splitlines()[0]
        raise UserError(field, folder, f"has no usable tokenizer: {problem}", "copy the tokenizer's files there") from error


def stop_token_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The end-of-text tokens from generation_config.json and the tokenizer, sorted."""
    path = folder / "generation_config.json"
    listed = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    ids = set(listed if isinstance(listed, list) else [listed]) | {tokenizer.eos_token_id}
    return tuple(sorted(ids - {None}))
