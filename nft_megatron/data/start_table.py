"""The table at the start of a run: what was read, what is left out and why, and prompts as the model sees them."""

from __future__ import annotations

from typing import Any

import numpy as np

from nft_megatron.data.prompts import PromptSet

_MAX_CHARS = 1200  # of an example


def start_table(questions: PromptSet, tokenizer: Any, field: str, num_examples: int = 3) -> str:
    """Rows, questions left out by reason, lengths in tokens, and up to ``num_examples`` prompts from the first to the last."""
    asked = questions.prompts
    lengths = np.array([len(prompt.tokens) for prompt in asked])
    counts = {
        "rows read": questions.num_rows,
        "repeated rows": questions.num_rows - questions.num_questions,
        "left out: another gold for the same question": questions.num_conflicting,
        **{f"left out: unmatched gold ({reason})": count for reason, count in questions.unmatched.items()},
        "left out: too long": questions.num_overlong,
        "questions asked": len(asked),
    }
    lines = [f"  {name:60} {count:>9,}" for name, count in counts.items() if count or name in ("rows read", "questions asked")]
    lines.append(f"  tokens of a prompt: {lengths.min()} to {lengths.max()}, mean {lengths.mean():.1f}")
    chosen = sorted({round(i) for i in np.linspace(0, len(asked) - 1, num_examples)})
    for number, index in enumerate(chosen, start=1):
        prompt = asked[index]
        text = tokenizer.decode(prompt.tokens)
        text = text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]} … ({len(text) - _MAX_CHARS} more characters)"
        lines.append(f"  prompt {number} ({prompt.question_id}, {len(prompt.tokens)} tokens, gold {prompt.gold!r}):")
        lines += [f"    | {line}".rstrip() for line in text.split("\n")]
    return "\n".join([field, *lines])
