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
from nft_megatron.data.rendering import prompt_texts, token_ids_of
from nft_megatron.data.requests import asks_for_answer_line, asks_for_box, has_box
from nft_megatron.data.wording import instruct, reword


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
    """Questions whose gold right answers may not match, by reason."""
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
    *,
    instructs_all: bool = True,
) -> PromptSet:
    """The prompts of ``questions``, in the same order, without the conflicting and overlong ones that ``settings`` drops.

    ``tokenizer`` is a Hugging Face tokenizer; ``now`` is for templates that print the date; ``instructs_all`` as in
    :func:`tokenize`. Raises :class:`UserError` for a question longer than ``settings.max_prompt_tokens`` under
    ``overlong: error``, if no question is left, and if a chat template is missing or refuses a question.
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
    prompts = tokenize(clear, tokenizer, settings, field, now, instructs_all=instructs_all)
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
    *,
    instructs_all: bool = True,
) -> list[Prompt]:
    """The prompts of all ``questions`` under the instruction and the template of ``settings``, however long.

    A question that is not in DAPO's wording is put into it unless its prompt already asks for the answer in that form: the
    question, a system message, or what the template adds. ``instructs_all=False`` leaves such a question as it stands.

    Raises :class:`UserError` as the functions of :mod:`~nft_megatron.data.rendering` do.
    """
    now = now or datetime.now()
    asked = [reword(question, settings.instruction) for question in questions]
    texts = prompt_texts(asked, tokenizer, settings, field, now)
    if instructs_all and (settings.instruction == "boxed" or settings.instruction == "answer"):
        missing = [i for i, text in enumerate(texts) if not _is_instructed(text, settings)]
        instructed = [instruct(asked[i], settings.instruction) for i in missing]
        for i, question, text in zip(
            missing, instructed, prompt_texts(instructed, tokenizer, settings, field, now), strict=True
        ):
            asked[i], texts[i] = question, text
    token_ids = token_ids_of(asked, texts, tokenizer, settings, field)
    return [
        Prompt(question.question_id, question.text, question.gold, np.array(ids, dtype=np.int32))
        for question, ids in zip(asked, token_ids, strict=True)
    ]


def _is_instructed(text: str, settings: DataConfig) -> bool:
    """Whether the prompt ``text`` asks for the form of answer that ``data.instruction`` is about, or shows it in examples."""
    if settings.instruction == "answer":
        return asks_for_answer_line(text)
    return asks_for_box(text) or (settings.template == "plain" and has_box(settings.plain_format))


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
