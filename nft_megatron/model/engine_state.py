"""What Transformer Engine's layers keep in a checkpoint beside weights, ``_extra_state``: scales of FP8, empty without it.

A run may begin without Transformer Engine and resume with it. Its checkpoints then lack those keys, which Megatron-Core
requires (dist_checkpointing/validation.py) and torch too (``Module.load_state_dict``). A layer without them keeps the state it
has. The other way round nothing is needed: what a checkpoint has too much is not read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

_NAME = "_extra_state"


def without_engine_state(model: dict[str, dict[str, Any]], keys: Iterable[str]) -> None:
    """Remove from the sharded state of every part of the model the extra states that the checkpoint's ``keys`` lack."""
    wanted = {
        (part, name): value.key
        for part, state in model.items()
        for name, value in state.items()
        if isinstance(value, ShardedObject) and _NAME in name
    }
    if not wanted:
        return
    stored = {key.partition("/shard_")[0] for key in keys}
    for (part, name), key in wanted.items():
        if key not in stored:
            del model[part][name]


def load_engine_state(module: torch.nn.Module, state: dict[str, Any]) -> None:
    """Give ``module`` the extra states in ``state``; it keeps all others."""
    _, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
