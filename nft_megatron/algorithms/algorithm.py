"""What an algorithm is: a name bound to pure functions of log-probs and verdicts.

The trainer minimises  Σ_tokens ω(q)·ℓ / D.  An algorithm gives ω (``prompt_weight``) and ℓ (``token_loss``); D belongs to
:mod:`nft_megatron.layout.denominator`. Suffix ``_N``: one entry a loss token, that is an answer token that is trained on.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from torch import Tensor

from nft_megatron.errors import UserError

Value = TypeVar("Value")


class TokenBatch(NamedTuple):
    """What a loss may look at, for N loss tokens of any answers in any order.

    ``logprob_N`` is log π_θ⁺(a_t | q, a_<t) and carries the gradient; ``old_logprob_N`` is log π of the policy that generated
    the answer; both float32 (float64 in tests). ``is_correct_N`` (bool) is r of the token's answer, ``correct_rate_N`` is r̂ of
    its question.
    """

    logprob_N: Tensor
    old_logprob_N: Tensor
    is_correct_N: Tensor
    correct_rate_N: Tensor


class TokenLoss(NamedTuple):
    """ℓ of every token, without ω and without any normalisation; differentiable in ``TokenBatch.logprob_N``.

    ``clamped_N`` (bool) marks the tokens whose ratio the algorithm bounded: for NFT, negative ratios below ε.
    """

    loss_N: Tensor
    clamped_N: Tensor


@dataclass(frozen=True)
class Algorithm:
    """An objective, and what it asks of the rooms around it.

    uses_wrong_answers: False means that wrong answers are never packed and never forwarded.
    prompt_weight: r̂ → ω, elementwise.
    token_loss: see :class:`TokenBatch` and :class:`TokenLoss`. ℓ of a token may not depend on other tokens, since packing
        and micro-batches separate them.
    """

    name: str
    uses_wrong_answers: bool
    prompt_weight: Callable[[Tensor], Tensor]
    token_loss: Callable[[TokenBatch], TokenLoss]


def with_gradient(value_N: Tensor, gradient_N: Tensor, logprob_N: Tensor) -> Tensor:
    """``value_N`` with ``gradient_N`` as its derivative in ``logprob_N``, neither of them differentiated.

    For losses whose two closed forms are accurate where automatic differentiation is not, or, like the straight-through
    max_v of NFT, whose gradient is deliberately not that of the value.

    >>> import torch
    >>> logprob_N = torch.tensor([-2.0], requires_grad=True)
    >>> loss_N = with_gradient(torch.tensor([3.0]), torch.tensor([0.5]), logprob_N)
    >>> loss_N.sum().backward()
    >>> loss_N.item(), logprob_N.grad.item()
    (3.0, 0.5)
    """
    return value_N.detach() + gradient_N.detach() * (logprob_N - logprob_N.detach())


def lookup(field: str, name: str, table: Mapping[str, Value]) -> Value:
    """``table[name]``.

    Raises:
        UserError: no such name; it tells the nearest one and all there are.

    >>> lookup("algorithm.name", "ntf", {"nft": 1, "rft": 2})
    Traceback (most recent call last):
    nft_megatron.errors.UserError: algorithm.name = ntf: unknown; did you mean 'nft'? known: nft, rft
    """
    if name in table:
        return table[name]
    nearest = difflib.get_close_matches(name, table, n=1)
    suggestion = f"did you mean '{nearest[0]}'? " if nearest else ""
    raise UserError(field, name, "unknown", f"{suggestion}known: {', '.join(table)}")
