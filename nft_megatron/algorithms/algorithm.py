"""What an algorithm is: a config model whose methods are pure functions of log-probs and verdicts.

The trainer minimises

    Σ_tokens ω·ℓ_t / D        coupling "token": ℓ of a token depends only on its own log-prob
    Σ_answers ω·ℓ_k / D       coupling "sequence" or "group": ℓ of an answer depends on the log-ratios of whole answers

An algorithm gives ω (:meth:`Algorithm.weight`) and ℓ (:meth:`Algorithm.token_loss` or :meth:`Algorithm.sequence_loss`); D
belongs to :mod:`nft_megatron.batching.denominator`. Formulas use only tensor methods, so that the configuration, which
contains algorithms, needs no torch.

Suffix ``_N``: one entry per loss token, that is, per answer token that is trained on. ``_A``: one entry per answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from nft_megatron.base.config_model import ConfigModel

if TYPE_CHECKING:
    from torch import Tensor

Coupling = Literal["token", "sequence", "group"]

LOG_RATIO_CAP = 10.0
"""The largest Δ = log R_t that formulas for wrong answers exponentiate."""


class AnswerBatch(NamedTuple):
    """Judged answers in any order, and what is known of them before any forward pass.

    They are all those of a step's questions or those of a micro-batch; under coupling "group" always all of their questions.
    ``group_A`` (int64) numbers the questions from 0. ``is_correct_A`` (bool) is r, ``correct_rate_A`` (float64, float32
    in a micro-batch) r̂ of the question. ``length_A`` (int64) is the answer's number of tokens, ``is_truncated_A`` (bool) marks
    truncated answers, and ``length_limit`` is the number of tokens at which answers are truncated. ``weight_A`` is
    :meth:`Algorithm.weight`, in a micro-batch divided by D, and ``advantage_A`` is :meth:`Algorithm.advantage`.

    >>> import torch
    >>> group_A, is_correct_A = torch.tensor([0, 0, 1, 1]), torch.tensor([True, False, False, False])
    >>> answers = AnswerBatch(group_A, is_correct_A, torch.tensor([0.5, 0.5, 0, 0]), torch.full((4,), 7), is_correct_A, 9)
    >>> answers.take(torch.tensor([3, 2])).group_A
    tensor([0, 0])
    """

    group_A: Tensor
    is_correct_A: Tensor
    correct_rate_A: Tensor
    length_A: Tensor
    is_truncated_A: Tensor
    length_limit: int
    weight_A: Tensor | None = None
    advantage_A: Tensor | None = None

    def take(self, index_A: Tensor) -> AnswerBatch:
        """The answers at ``index_A``, their groups numbered from 0 again."""
        taken = self.each(lambda value_A: value_A[index_A])
        return taken._replace(group_A=taken.group_A.unique(return_inverse=True)[1])

    def each(self, change: Callable[[Tensor], Tensor]) -> AnswerBatch:
        """The same with ``change`` applied to every tensor."""
        fields: dict[str, Any] = self._asdict()
        tensors = {name: value for name, value in fields.items() if value is not None and name != "length_limit"}
        return AnswerBatch(**fields | {name: change(value) for name, value in tensors.items()})


class TokenBatch(NamedTuple):
    """The inputs of a loss of coupling "token", for N loss tokens of any answers in any order.

    ``logprob_N`` is log π_θ⁺(a_t | q, a_<t) and carries the gradient; ``old_logprob_N`` is log π of the policy that generated
    the answer; both float32 (float64 in tests). ``is_correct_N`` (bool) is r of the token's answer, ``correct_rate_N`` is r̂ of
    its question, ``advantage_N`` is :meth:`Algorithm.advantage` of its answer.

    >>> import torch
    >>> logprob_N = torch.tensor([-0.7, -0.1], requires_grad=True)
    >>> TokenBatch(logprob_N, logprob_N.detach(), torch.tensor([True, False]), torch.tensor([0.5, 0.5])).advantage_N is None
    True
    """

    logprob_N: Tensor
    old_logprob_N: Tensor
    is_correct_N: Tensor
    correct_rate_N: Tensor
    advantage_N: Tensor | None = None


class TokenLoss(NamedTuple):
    """ℓ of every token, without ω or any normalisation; differentiable in ``TokenBatch.logprob_N``.

    ``clamped_N`` (bool) marks the tokens whose ratio the algorithm bounded: for NFT negative ratios below ε, for GRPO and its
    relatives ratios beyond the clip.

    >>> import torch
    >>> TokenLoss(torch.tensor([0.7, 0.1]), torch.tensor([False, True])).clamped_N.sum()
    tensor(1)
    """

    loss_N: Tensor
    clamped_N: Tensor


class Algorithm(ConfigModel):
    """An objective with its options and its requirements on the trainer. Subclasses are found by their ``name``.

    coupling: what ℓ depends on. "sequence": the trainer first sums log-ratios over each answer, across context-parallel
        ranks. "group": in addition, all answers to a question are in one micro-batch.
    uses_wrong_answers: False means that wrong answers are never packed and never forwarded.
    needs_mixed_groups: questions with r̂ = 0 or 1 have no loss or an undefined one. False: they may be trained on.
    """

    name: str
    coupling: ClassVar[Coupling] = "token"
    uses_wrong_answers: ClassVar[bool] = True
    needs_mixed_groups: ClassVar[bool] = True

    def weight(self, answers: AnswerBatch) -> Tensor:
        """ω of each answer, shape A; here 1."""
        return answers.correct_rate_A.new_ones(len(answers.correct_rate_A))

    def advantage(self, answers: AnswerBatch) -> Tensor | None:
        """One number per answer, shape A, that its loss may use; answers with 0 are never forwarded. None: no such number."""
        return None

    def token_loss(self, batch: TokenBatch) -> TokenLoss:
        """ℓ of every token. ℓ may not depend on other tokens, since packing and micro-batches separate them."""
        raise NotImplementedError(f"{self.name} has coupling {self.coupling!r}")

    def sequence_loss(self, answers: AnswerBatch, log_ratio_A: Tensor) -> Tensor:
        """ℓ of every answer, shape A; differentiable in ``log_ratio_A``.

        ``log_ratio_A`` = Σ_t log R_t is summed over all tokens of the answer, on whatever context-parallel rank they lie.
        """
        raise NotImplementedError(f"{self.name} has coupling {self.coupling!r}")


def with_gradient(value_N: Tensor, gradient_N: Tensor, logprob_N: Tensor) -> Tensor:
    """``value_N`` with ``gradient_N`` as its derivative in ``logprob_N``; neither is differentiated.

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


def group_mean(value_A: Tensor, group_A: Tensor) -> Tensor:
    """The mean of ``value_A`` over each answer's group, shape A.

    >>> import torch
    >>> group_mean(torch.tensor([1.0, 0.0, 4.0]), torch.tensor([1, 1, 0]))
    tensor([0.5000, 0.5000, 4.0000])
    """
    sums_G = value_A.new_zeros(len(value_A)).index_add(0, group_A, value_A)
    counts_G = value_A.new_zeros(len(value_A)).index_add(0, group_A, value_A.new_ones(len(value_A)))
    return (sums_G / counts_G.clamp(min=1))[group_A]
