"""Iterative DPO in its InfoNCA form, for K > 2 answers to a question, with a supervised regulariser.

Appendix B.2.6 of arXiv 2505.18116, the loss of arXiv 2402.05369. With the log-ratios S_k = Σ_t log R_t of whole answers and
the target distribution p_k = r_k / Σ_i r_i over the K answers of a question:

    ℓ_k = − p_k · log( e^{β S_k} / Σ_i e^{β S_i} ) − λ · p_k · S_k

    R_t = π_θ(a_t | q, a_<t) / π(a_t | q, a_<t)        π: the policy that generated the answers, the reference of this iteration

For K = 2, one right and one wrong, and λ = 0 this is DPO: −log σ(β (S_right − S_wrong)). For every token of answer k

    dℓ/dlogp = β·(softmax_k(β S) − p_k) − λ·p_k

The trainer divides the sum over answers by the same D as the token losses of the other algorithms, since every token has such
a coefficient.

Departures from the published algorithm:
 1. The paper adds "an SFT regularisation term" without giving its form or weight. Here it is the cross-entropy of the same
    target distribution, −Σ_k p_k log π_θ(a_k) up to a constant, with λ = ``sft_weight``; 0.1 is our choice.
 2. Unjudged and empty answers are not among the K.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from nft_megatron.algorithms.algorithm import Algorithm, AnswerBatch, Coupling
from nft_megatron.base.config_model import PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor


class InfoNCA(Algorithm):
    """Iterative DPO over all answers of a question (InfoNCA) with an SFT regulariser."""

    name: Literal["infonca"] = "infonca"
    """Contrasts a question's right answers with all of its answers; needs all of them in one micro-batch."""
    beta: PositiveFloat = 0.1
    """β of the implicit reward β·S. The paper tried 0.1, 0.02 and 0.01."""
    sft_weight: Annotated[float, Field(ge=0)] = 0.1
    """λ, weight of the supervised term on right answers."""
    coupling: ClassVar[Coupling] = "group"

    def sequence_loss(self, answers: AnswerBatch, log_ratio_A: Tensor) -> Tensor:
        return infonca_loss(answers, log_ratio_A, beta=self.beta, sft_weight=self.sft_weight)


def infonca_loss(answers: AnswerBatch, log_ratio_A: Tensor, *, beta: float = 0.1, sft_weight: float = 0.0) -> Tensor:
    """ℓ_k of every answer, shape A. The gradient of a question's loss reaches all of its answers, even those with ℓ_k = 0.

    >>> import torch
    >>> log_ratio_A, is_correct_A, ones_A = torch.tensor([3.0, 1.0]), torch.tensor([True, False]), torch.ones(2)
    >>> answers = AnswerBatch(torch.tensor([0, 0]), is_correct_A, ones_A / 2, ones_A, ones_A > 1, length_limit=8)
    >>> infonca_loss(answers, log_ratio_A, beta=0.5).sum(), -torch.tensor(0.5 * (3 - 1)).sigmoid().log()
    (tensor(0.3133), tensor(0.3133))
    """
    logit_A, num_answers = beta * log_ratio_A, len(log_ratio_A)
    is_correct_A = answers.is_correct_A.to(logit_A)
    num_right_G = logit_A.new_zeros(num_answers).index_add(0, answers.group_A, is_correct_A)
    target_A = is_correct_A / num_right_G.clamp(min=1)[answers.group_A]
    largest_G = logit_A.new_zeros(num_answers).scatter_reduce(0, answers.group_A, logit_A.detach(), "amax", include_self=False)
    exp_A = (logit_A - largest_G[answers.group_A]).exp()
    sum_G = logit_A.new_zeros(num_answers).index_add(0, answers.group_A, exp_A)
    log_softmax_A = logit_A - (largest_G[answers.group_A] + sum_G[answers.group_A].log())
    return -target_A * (log_softmax_A + sft_weight * log_ratio_A)
