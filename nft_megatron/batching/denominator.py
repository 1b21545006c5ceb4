"""D of contract 1: loss = Σ_tokens ω·ℓ / D, with one D per mini-batch over all ranks and micro-batches.

D follows from the lengths of the answers, which every rank knows, so it needs no collective. Each rank computes the gradient of
its own part of Σ ω·ℓ divided by D, and the gradients are summed: the result does not depend on how the batch was split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from nft_megatron.base.errors import UserError

Denominator = Literal["tokens", "sequences"] | float


def loss_denominator(kind: Denominator, answer_lengths: Sequence[int]) -> float:
    """D for a mini-batch whose judged answers have ``answer_lengths`` tokens.

    ``tokens``: the number of their tokens (DAPO's token-level loss, the paper's choice). ``sequences``: the number of answers.
    A number: itself; the authors' code divides by 1000 and averages over data-parallel ranks, which equals 1000 · ranks.

    Raises:
        UserError: for any other word, or a number ≤ 0.

    >>> [loss_denominator(kind, [30, 10]) for kind in ("tokens", "sequences", 32_000)]
    [40.0, 2.0, 32000.0]
    """
    if kind == "tokens":
        return float(sum(answer_lengths))
    if kind == "sequences":
        return float(len(answer_lengths))
    if isinstance(kind, str) or not kind > 0:
        raise UserError("train.denominator", kind, "is not a denominator", "use tokens, sequences or a number > 0")
    return float(kind)
