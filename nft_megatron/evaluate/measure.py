"""Answers the questions of a benchmark part by part, one ledger file per part, so that a killed evaluation asks nothing twice.

The parts depend only on the questions and the settings. So does an answer: its seed comes from the run's seed, the benchmark,
the question's position and the answer's number. A restarted evaluation reads the parts that exist and asks the rest exactly as
before, so that it ends with the same answers as one that was never interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Group, Prompt, Sampling
from nft_megatron.collect.generate_and_grade import RolloutClient
from nft_megatron.data.ledger import read_groups, read_meta, read_verifiers, write_ledger
from nft_megatron.evaluate.benchmarks import Benchmark
from nft_megatron.evaluate.run import Evaluation
from nft_megatron.verify.rules import other_rules

ANSWERS_PER_PART = 512
"""The most that a killed evaluation loses, and the engine's unit of work."""


@dataclass(frozen=True)
class Task:
    """A benchmark to measure, with ``samples`` answers to each of its prompts."""

    benchmark: Benchmark
    prompts: tuple[Prompt, ...]
    samples: int


@dataclass(frozen=True)
class Part:
    """The questions ``first`` to ``stop`` − 1 of a task, answered with at most ``max_tokens`` tokens, in one file."""

    task: Task
    first: int
    stop: int
    max_tokens: int
    path: Path


def plan_parts(task: Task, max_tokens: int, context: int, folder: Path) -> list[Part]:
    """The parts of ``task``: neighbouring questions with the same room for answers, at most ``ANSWERS_PER_PART`` answers each.

    An answer is shorter than ``max_tokens`` if its prompt leaves less of the model's ``context``. Raises :class:`UserError` for
    a prompt that leaves nothing.
    """
    room = [min(max_tokens, context - len(prompt.tokens)) for prompt in task.prompts]
    if min(room) < 1:
        longest = max(task.prompts, key=lambda prompt: len(prompt.tokens))
        raise UserError(
            "--benchmarks",
            longest.question_id,
            f"has {len(longest.tokens)} tokens, but the model's context is {context}",
            "measure a model with a longer context, or remove the question from its file",
        )
    most = max(1, ANSWERS_PER_PART // task.samples)
    starts = [0]
    for position in range(1, len(room)):
        if room[position] != room[position - 1] or position - starts[-1] == most:
            starts.append(position)
    return [
        Part(task, first, stop, room[first], folder / "answers" / task.benchmark.name / f"part_{first:06d}.parquet")
        for first, stop in zip(starts, [*starts[1:], len(room)], strict=True)
    ]


def questions_hash(prompts: Sequence[Prompt]) -> str:
    """A hash of all prompts and golds, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.question_id}\0{prompt.gold}\0".encode() + np.asarray(prompt.tokens, np.int32).tobytes())
    return digest.hexdigest()[:16]


def check_part(part: Part, settings: dict[str, Any]) -> None:
    """Raise :class:`UserError` if the part's file has answers from other settings than ``settings``."""
    recorded = read_meta(part.path)["settings"]
    if "rules" not in recorded:  # written before the rules were part of the settings
        own = other_rules(read_verifiers(part.path), settings["grader"])
        recorded = recorded | {"rules": own or settings["rules"]}
    for key in sorted(settings.keys() | recorded.keys()):
        if recorded.get(key) != settings.get(key):
            raise UserError(
                "--out",
                part.path,
                f"has answers with {key} = {recorded.get(key)}, but it is {settings.get(key)} now",
                "restore that value, or name another folder",
            )


def answer_part(part: Part, client: RolloutClient, sampling: Sampling, settings: dict[str, Any]) -> Evaluation:
    """Answer and judge a part, write its file and return the answers. :func:`check_part` compares ``settings``."""
    prompts = part.task.prompts[part.first : part.stop]
    name = part.task.benchmark.name
    answers = client.ask(
        prompts,
        part.task.samples,
        replace(sampling, max_tokens=part.max_tokens),
        purpose=f"evaluate {name}",
        first_id=part.first,
        label=f"{name}, questions {part.first + 1} to {part.stop} of {len(part.task.prompts)}",
    )
    groups = [Group(part.first + i, 0, prompt, answers[i]) for i, prompt in enumerate(prompts)]
    write_ledger(part.path, groups, fates=["sampled"] * len(groups), meta={"settings": settings})
    return Evaluation(prompts, tuple(answers))


def read_answers(parts: Sequence[Part]) -> Evaluation:
    """All answers in the parts of one task."""
    groups = [group for part in parts for group, _ in read_groups(part.path)]
    return Evaluation(tuple(group.prompt for group in groups), tuple(group.answers for group in groups))
