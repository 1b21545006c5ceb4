"""From questions to token ids, and the seeded, endless order in which they are asked."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Prompt, Question
from nft_megatron.config.sections import DataConfig
from nft_megatron.data.conflicts import find_conflicts
from nft_megatron.data.rendering import token_ids_of
from nft_megatron.data.wording import reword


@dataclass(frozen=True)
class PromptSet:
    """The prompts that are asked, and how many questions of their data set are left out.

    >>> PromptSet(num_conflicting=3, num_overlong=1).left_out
    {'questions_conflicting': 3, 'questions_overlong': 1}
    """

    prompts: tuple[Prompt, ...] = ()
    num_conflicting: int = 0
    num_overlong: int = 0
    unmatched: Mapping[str, int] = field(default_factory=dict)
    """Questions whose gold no answer can match, by reason."""
    num_rows: int = 0
    """Rows read, repeated ones included."""

    @property
    def num_questions(self) -> int:
        """Of the whole data set."""
        return len(self.prompts) + self.num_conflicting + self.num_overlong + sum(self.unmatched.values())

    @property
    def left_out(self) -> dict[str, int]:
        """The counts, under their names in the metrics."""
        unmatched = {"questions_unmatched": sum(self.unmatched.values())} if self.unmatched else {}
        return {"questions_conflicting": self.num_conflicting, "questions_overlong": self.num_overlong} | unmatched


def make_prompts(
    questions: Sequence[Question],
    tokenizer: Any,
    settings: DataConfig,
    field: str = "data.train",
    now: datetime | None = None,
) -> PromptSet:
    """The prompts of ``questions``, in the same order, without the conflicting and overlong ones that ``settings`` drops.

    ``tokenizer`` is a Hugging Face tokenizer; ``now`` is for templates that print the date. Raises :class:`UserError` for a
    question longer than ``settings.max_prompt_tokens`` under ``overlong: error``, if no question is left, and if a chat
    template is missing or refuses a question.
    """
    conflicts = find_conflicts(questions) if settings.conflicting == "drop" else []
    conflicting = {question.question_id for group in conflicts for question in group}
    clear = [question for question in questions if question.question_id not in conflicting]
    if questions and not clear:
        first = conflicts[0]
        raise UserError(
            field,
            f"{len(questions)} questions",
            f"all conflict, like {first[0].question_id!r} and {first[1].question_id!r}",
            "correct their golds, or set data.conflicting=keep",
        )
    prompts = tokenize(clear, tokenizer, settings, field, now)
    kept = [prompt for prompt in prompts if len(prompt.tokens) <= settings.max_prompt_tokens]
    dropped = len(prompts) - len(kept)
    if dropped and (settings.overlong == "error" or not kept):
        longest = max(prompts, key=lambda prompt: len(prompt.tokens))
        raise UserError(
            "data.max_prompt_tokens",
            settings.max_prompt_tokens,
            f"{dropped} of {len(prompts)} questions of {field} are longer; the longest, {longest.question_id!r}, has "
            f"{len(longest.tokens)} tokens",
            f"raise it to {len(longest.tokens)}" + (", or set data.overlong=drop" if kept else ""),
        )
    return PromptSet(tuple(kept), len(questions) - len(clear), dropped)


def tokenize(
    questions: Sequence[Question],
    tokenizer: Any,
    settings: DataConfig,
    field: str = "data.train",
    now: datetime | None = None,
) -> list[Prompt]:
    """The prompts of all ``questions`` under the instruction and the template of ``settings``, however long.

    Raises :class:`UserError` as :func:`~nft_megatron.data.rendering.token_ids_of` does.
    """
    asked = [reword(question, settings.instruction) for question in questions]
    token_ids = token_ids_of(asked, tokenizer, settings, field, now or datetime.now())
    return [
        Prompt(question.question_id, question.text, question.gold, np.array(ids, dtype=np.int32))
        for question, ids in zip(asked, token_ids, strict=True)
    ]


@functools.lru_cache(maxsize=4)
def _epoch_order(num_prompts: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_prompts)


@dataclass(frozen=True)
class PromptOrder:
    """An endless order of prompts: one permutation per epoch, drawn from (seed, epoch).

    The cursor, a number of prompts, is the whole state: a resumed run takes prompts from the saved cursor.

    >>> order = PromptOrder(prompts=("a", "b", "c"), seed=0)
    >>> order.take(0, 3) + order.take(3, 3) == order.take(0, 6)
    True
    >>> sorted(order.take(3, 3))
    ['a', 'b', 'c']
    """

    prompts: Sequence[Prompt]
    seed: int

    def index(self, position: int) -> int:
        """The index of the prompt at ``position`` of the order."""
        epoch, within = divmod(position, len(self.prompts))
        return int(_epoch_order(len(self.prompts), self.seed, epoch)[within])

    def take(self, cursor: int, num: int) -> list[Prompt]:
        """The prompts at positions ``cursor`` to ``cursor + num - 1``."""
        return [self.prompts[self.index(position)] for position in range(cursor, cursor + num)]
