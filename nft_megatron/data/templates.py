r"""How a question becomes the text that a model family reads; ``data.template`` names the way.

| name | for | system message |
|---|---|---|
| ``chat`` | every model whose tokenizer has a chat template; verl, under the paper's code, does the same | the template's own |
| ``qwen2.5-math`` | Qwen2.5 models that are not Qwen2.5-Math, asked as Qwen2.5-Math is | "Please reason step by step, …" |
| ``plain`` | base models without a chat template: ``data.plain_format`` | none |

The chat template of Qwen2.5-Math adds its system message by itself, so for the paper's 7B model ``chat`` and
``qwen2.5-math`` give the same text. ``data.system_prompt`` replaces either system message.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """``uses_chat``: apply the tokenizer's chat template, with ``system_prompt`` if there is one."""

    uses_chat: bool
    system_prompt: str | None = None


TEMPLATES = {
    "chat": Template(uses_chat=True),
    "qwen2.5-math": Template(
        uses_chat=True, system_prompt="Please reason step by step, and put your final answer within \\boxed{}."
    ),
    "plain": Template(uses_chat=False),
}
