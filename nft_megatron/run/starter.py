"""A first configuration for a model and a data file: ``nft-megatron init MODEL DATA``.

What can be read from the two is set: template, lengths, sizes, and whether golds fit the verifier. The rest has the paper's
values, and is left out of the file.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.errors import UserError
from nft_megatron.collect.build import read_prompts
from nft_megatron.config.load import apply_override, config_from, load_config
from nft_megatron.config.schema import Config
from nft_megatron.data.start_table import start_table
from nft_megatron.data.tokenizer import load_tokenizer
from nft_megatron.weights import num_parameters, read_shape

_ROOM = 1.25
"""Longest prompt allowed, as a multiple of the longest one: held-out questions may be longer."""
_SIZES = tuple(2**power for power in range(10))
"""Of a step, in questions: up to the paper's 512, and at most half of what there are."""
_UPDATES = (16, 8, 4, 2)
_SMALL = 500_000_000
"""Parameters up to which the engine beside the trainer is quick enough, also without a GPU."""


def write_starter(model: Path, data: Path, out: Path, overrides: Sequence[str]) -> None:
    """Write ``out``, a configuration that ``nft-megatron train`` accepts, and print what was read of the data.

    ``overrides`` are written too, and what depends on them follows.

    Raises:
        UserError: ``out`` exists, the model or the data cannot be used, or the two do not fit.
    """
    if out.exists():
        raise UserError("--out", out, "exists already", "name another file, or delete it")
    tree, tokenizer = starter(model, data, out, overrides), load_tokenizer(model, "MODEL")
    prompts = read_prompts(_config(tree), tokenizer, "data.train")
    with atomic_file(out) as temporary:
        temporary.write_text(_text(tree))
    load_config(out)
    print(start_table(prompts, tokenizer, "data.train"))
    print(f"\n{out}; begin with:\n  nft-megatron plan {out} --gpus 1\n  nft-megatron train {out}")


def starter(model: Path, data: Path, out: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration as nested dictionaries."""
    shape, tokenizer = read_shape(model, "MODEL"), load_tokenizer(model, "MODEL")
    is_small = num_parameters(shape) <= _SMALL
    given: dict[str, Any] = {}
    for override in overrides:
        apply_override(given, override)
    asked: dict[str, Any] = {"train": str(data), "template": "chat" if tokenizer.chat_template else "plain"} | given.get(
        "data", {}
    )
    to_read: dict[str, Any] = {
        "run_dir": f"runs/{out.stem}",
        "model": {"path": str(model)},
        "data": {"max_prompt_tokens": shape.max_positions, "overlong": "drop"} | asked,
        "rollout": {"max_answer_tokens": 1},
        "train": {"num_steps": 1, "micro_batch_tokens": shape.max_positions + 1},
        "verify": given.get("verify", {}),
    }
    prompts = read_prompts(_config(to_read), tokenizer, "data.train").prompts
    longest = max(len(prompt.tokens) for prompt in prompts)
    longest = min(_round_up(int(longest * _ROOM)), max(longest, shape.max_positions // 2))
    longest = asked.get("max_prompt_tokens", longest)
    room = shape.max_positions - longest
    if room < 1:
        problem = f"leaves no room for an answer beside a prompt of {longest} tokens: its context is {shape.max_positions}"
        raise UserError("MODEL", model, problem, "take a model with a longer context, or set data.max_prompt_tokens")
    rollout: dict[str, Any] = {
        "engine": "embedded" if is_small else "vllm",
        "questions_per_step": max(size for size in _SIZES if size <= max(1, len(prompts) // 2)),
        "group_size": 16,
        "max_answer_tokens": min(3584, room),
    } | given.get("rollout", {})
    per_step, answer = rollout["questions_per_step"], rollout["max_answer_tokens"]
    train: dict[str, Any] = {
        "num_steps": 100,
        "updates_per_step": next((updates for updates in _UPDATES if per_step % updates == 0), 1),
        "micro_batch_tokens": max(16384, longest + answer),
    }
    return {
        "run_dir": f"runs/{out.stem}",
        "model": {"path": str(model), "dtype": "float32" if is_small else "bfloat16"} | given.pop("model", {}),
        "data": asked | {"max_prompt_tokens": longest},
        "rollout": rollout,
        "train": train | given.pop("train", {}),
        **{name: value for name, value in given.items() if name not in ("data", "rollout")},
    }


def _config(tree: dict[str, Any]) -> Config:
    return config_from(copy.deepcopy(tree))


def _round_up(tokens: int) -> int:
    return -(-tokens // 64) * 64


_COMMENTS = {
    "run_dir": "everything the run writes",
    "model.dtype": "bfloat16 on GPUs for anything larger",
    "data.template": "chat: the model's own; plain: data.plain_format, for base models",
    "data.max_prompt_tokens": "the longest question with a quarter more",
    "rollout.engine": "embedded: beside the trainer, for small models; vllm: servers, see docs/fleet.md",
    "rollout.questions_per_step": "with right and wrong answers; the paper has 512",
    "rollout.group_size": "answers to a question",
    "rollout.max_answer_tokens": "longer answers are cut and count as wrong",
    "train.num_steps": "rollout steps; may be raised later",
    "train.updates_per_step": "optimizer updates in each",
    "train.micro_batch_tokens": "of one forward pass: lower it if memory runs out",
}


_HINT = (
    "",
    "# With held-out questions, accuracy is measured during training and the best checkpoint can be kept:",
    "# evaluate:",
    "#   data: held_out.parquet",
    "# checkpoint:",
    "#   keep_best: 1",
)


def _text(tree: dict[str, Any]) -> str:
    lines = [
        "# Written by `nft-megatron init`. `nft-megatron train --help` explains all fields; the others have the paper's values."
    ]
    for section, value in tree.items():
        if isinstance(value, dict):
            lines += ["", f"{section}:", *(_line(key, each, f"{section}.{key}", "  ") for key, each in value.items())]
        else:
            lines.append(_line(section, value, section, ""))
    return "\n".join([*lines, *_HINT]) + "\n"


def _line(key: str, value: Any, name: str, indent: str) -> str:
    shown = json.dumps(value, ensure_ascii=False)  # JSON is YAML
    comment = f" # {_COMMENTS[name]}" if name in _COMMENTS else ""
    return f"{indent}{key}: {shown}{comment}"
