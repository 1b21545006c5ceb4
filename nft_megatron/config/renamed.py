"""Renamed and added keys: a user's old key is an error that names the new one; an earlier run's own files are translated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

RENAMED = {
    "rollout.answers_per_question": "rollout.group_size",
    "rollout.gate_questions": "rollout.probe_questions",
    "rollout.gate_tokens": "rollout.probe_tokens",
}
"""Old key → new key."""
_BESIDE_A_RECORD = ("ledger", "metrics.jsonl", "slurm", "job.sh")


def is_record(path: Path) -> bool:
    """Whether ``path`` is the configuration that a run wrote to its own folder, not one that a person maintains."""
    return path.name == "config.yaml" and any((path.parent / name).exists() for name in _BESIDE_A_RECORD)


def translate(tree: dict[str, Any]) -> None:
    """Rename the old keys of ``tree``, in place, and say what an earlier version did where it had no key for it.

    >>> tree = {"rollout": {"answers_per_question": 8}}
    >>> translate(tree)
    >>> tree
    {'rollout': {'group_size': 8}, 'train': {'minibatch_of': 'questions'}}
    """
    for old, new in RENAMED.items():
        section, _, leaf = old.partition(".")
        if isinstance(fields := tree.get(section), dict) and leaf in fields:
            fields[new.rpartition(".")[2]] = fields.pop(leaf)
    if isinstance(train := tree.setdefault("train", {}), dict):
        train.setdefault("minibatch_of", "questions")
