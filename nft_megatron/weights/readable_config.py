"""What transformers needs to be told of a model folder whose config.json it refuses to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def readable_config(folder: Path) -> Any:
    """transformers' configuration of ``folder`` without token ids that are text, if it has any; otherwise None.

    transformers 5 refuses ``"eos_token_id": "<|end|>"``, which earlier versions took. Which tokens end an answer is read by
    :func:`~nft_megatron.data.tokenizer.stop_token_ids`; neither the tokenizer nor the model's computation needs them. None
    leaves the reading to transformers, also of a file that is damaged.
    """
    from transformers import AutoConfig

    try:
        tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kept = {name: value for name, value in tree.items() if not (name.endswith("_token_id") and _has_text(value))}
        return type(AutoConfig.for_model(tree["model_type"])).from_dict(kept) if len(kept) < len(tree) else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None


def _has_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and any(isinstance(item, str) for item in value))
