"""From questions to token ids, and the seeded, endless order in which they are asked."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from nft_megatron.config import DataSection
from nft_megatron.errors import UserError
from nft_megatron.records import Prompt, Question

BOXED_INSTRUCTION = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: \\boxed{$Answer} where $Answer is the answer to the problem.\n\n{question}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
# The wording of DAPO-Math-17k as published ("Answer: $Answer (without quotes)") and in the variants that ask for a box.
_DAPO_WORDING = re.compile(
    r"\s*Solve the following math problem step by step\. The last line of your response should be of the form Answer: "
    r"[^\n]*? is the answer to the problem\.\s+(?P<question>.*?)\s+"
    r'Remember to put your answer on its own line after "Answer:"\.\s*',
    re.DOTALL,
)


def reword(question: Question, instruction: Literal["keep", "boxed", "none"]) -> Question:
    r"""The question with its DAPO wording kept, asking for a ``\boxed{}`` answer instead (as NFT does), or stripped.

    A question in any other wording is returned as it is.

    >>> text = ("Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    ...         "$Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is 2+2?\n\n"
    ...         'Remember to put your answer on its own line after "Answer:".')
    >>> reword(Question("q", ({"role": "user", "content": text},), gold="4"), "none").text
    'What is 2+2?'
    """
    if instruction == "keep":
        return question

    def reworded(message: dict[str, str]) -> dict[str, str]:
        match = _DAPO_WORDING.fullmatch(message["content"])
        if match is None:
            return message
        wording = BOXED_INSTRUCTION if instruction == "boxed" else "{question}"
        return {**message, "content": wording.replace("{question}", match["question"])}

    return replace(question, messages=tuple(reworded(message) for message in question.messages))


def make_prompts(
    questions: Sequence[Question], tokenizer: Any, settings: DataSection, field: str = "data.train"
) -> tuple[list[Prompt], int]:
    """The prompts of ``questions`` in the same order, and how many were dropped for being too long.

    ``tokenizer`` is a Hugging Face tokenizer. Raises :class:`UserError` for a question longer than
    ``settings.max_prompt_tokens`` under ``overlong: error``, when none is left, and for a chat template that is missing.
    """
    texts = [reword(question, settings.instruction) for question in questions]
    prompts = [
        Prompt(question.question_id, question.text, question.gold, np.array(token_ids, dtype=np.int32))
        for question, token_ids in zip(texts, _tokenize(texts, tokenizer, settings), strict=True)
    ]
    kept = [prompt for prompt in prompts if len(prompt.tokens) <= settings.max_prompt_tokens]
    dropped = len(prompts) - len(kept)
    if dropped and (settings.overlong == "error" or not kept):
        longest = max(prompts, key=lambda prompt: len(prompt.tokens))
        raise UserError(
            "data.max_prompt_tokens", settings.max_prompt_tokens,
            f"{dropped} of {len(prompts)} questions of {field} are longer; the longest, {longest.question_id!r}, has "
            f"{len(longest.tokens)} tokens",
            f"raise it to {len(longest.tokens)}" + (", or set data.overlong=drop" if kept else ""),
        )  # fmt: skip
    return kept, dropped


def _tokenize(questions: Sequence[Question], tokenizer: Any, settings: DataSection) -> list[list[int]]:
    if settings.template == "plain":
        # Not str.format: a question or a format with LaTeX is full of braces.
        texts = [settings.plain_format.replace("{question}", question.text) for question in questions]
        return tokenizer(texts)["input_ids"] if texts else []
    if not tokenizer.chat_template:
        raise UserError("data.template", "chat", "the tokenizer has no chat template", "set data.template=plain")
    conversations = [_with_system(question.messages, settings.system_prompt) for question in questions]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in conversations]
    # The template writes the special tokens itself.
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _with_system(messages: Sequence[dict[str, str]], system_prompt: str | None) -> list[dict[str, str]]:
    """``messages`` under ``system_prompt``, which replaces a system message of the data set; None leaves them alone."""
    if system_prompt is None:
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *(message for message in messages if message["role"] != "system")]


@functools.lru_cache(maxsize=4)
def _epoch_order(num_prompts: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_prompts)


@dataclass(frozen=True)
class PromptOrder:
    """An endless order of prompts: one permutation an epoch, each drawn from (seed, epoch).

    The cursor, a number of prompts, is its whole state, so that resuming is taking from the saved cursor.

    >>> order = PromptOrder(prompts=("a", "b", "c"), seed=0)
    >>> order.take(0, 3) + order.take(3, 3) == order.take(0, 6)
    True
    >>> sorted(order.take(3, 3))
    ['a', 'b', 'c']
    """

    prompts: Sequence[Prompt]
    seed: int

    def index(self, position: int) -> int:
        """Which prompt stands at ``position`` of the order."""
        epoch, within = divmod(position, len(self.prompts))
        return int(_epoch_order(len(self.prompts), self.seed, epoch)[within])

    def take(self, cursor: int, num: int) -> list[Prompt]:
        """The prompts at positions ``cursor`` to ``cursor + num - 1``."""
        return [self.prompts[self.index(position)] for position in range(cursor, cursor + num)]
