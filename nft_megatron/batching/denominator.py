"""D of contract 1: loss = Σ_tokens ω·ℓ / D, one D for a whole mini-batch over all ranks and micro-batches.

D follows from the answers' lengths, which every rank knows, so no collective is needed. Each rank's gradient is that of its
own part of Σ ω·ℓ divided by this D, and the parts are summed: the result doesn't depend on how the batch was cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from nft_megatron.base.errors import UserError

Denominator = Literal["tokens", "sequences"] | float


def loss_denominator(kind: Denominator, answer_lengths: Sequence[int]) -> float:
    """D for a mini-batch whose answers, those that are trained on, have ``answer_lengths`` tokens.

    ``tokens``: all their tokens (DAPO's token-level loss, the paper's choice). ``sequences``: how many they are. A number:
    itself; the authors' code divides by 1000 and averages over data-parallel ranks, which is the number 1000 · ranks.

    Raises:
        UserError: another word, or a number ≤ 0.

    >>> [loss_denominator(kind, [30, 10]) for kind in ("tokens", "sequences", 32_000)]
    [40.0, 2.0, 32000.0]
    """
    if kind == "tokens":
        return float(sum(answer_lengths))
    if kind == "sequences":
        return float(len(answer_lengths))
    if isinstance(kind, str) or not kind > 0:
        raise UserError("train.denominator", kind, "not a denominator", "use tokens, sequences or a number > 0")
    return float(kind)
