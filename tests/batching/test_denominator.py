"""D of the loss; a loss divided by it does not depend on how the mini-batch was split."""

import numpy as np
import pytest
import torch

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import AnswerTokens
from nft_megatron.batching.denominator import loss_denominator
from nft_megatron.batching.packing import pack, plan_micro_batches


@pytest.mark.parametrize(("kind", "expected"), [("tokens", 12.0), ("sequences", 3.0), (32000, 32000.0), (0.5, 0.5)])
def test_values(kind, expected):
    assert loss_denominator(kind, [3, 4, 5]) == expected


@pytest.mark.parametrize("kind", ["token", 0, -1.0, float("nan")])
def test_anything_else_is_a_user_error(kind):
    with pytest.raises(UserError, match=r"train\.denominator"):
        loss_denominator(kind, [3])


@pytest.mark.parametrize("kind", ["tokens", "sequences", 100.0])
@pytest.mark.parametrize(("num_ranks", "budget"), [(1, 1000), (1, 40), (3, 40), (8, 64)])
def test_the_sum_over_ranks_and_micro_batches_is_the_loss_of_the_whole(kind, num_ranks, budget):
    generator = np.random.default_rng(0)
    answer_lengths = generator.integers(1, 35, size=24).tolist()
    answers = [AnswerTokens(np.arange(1, 4), np.arange(length), np.zeros(length)) for length in answer_lengths]
    losses = [torch.from_numpy(generator.normal(size=length)) for length in answer_lengths]
    weights = torch.from_numpy(generator.uniform(size=24))

    total = sum(float(w) * loss.sum().item() for w, loss in zip(weights, losses, strict=True))
    expected = total / {"tokens": sum(answer_lengths), "sequences": 24, 100.0: 100.0}[kind]

    plan = plan_micro_batches([3 + length for length in answer_lengths], token_budget=budget, num_ranks=num_ranks)
    denominator = loss_denominator(kind, answer_lengths)
    parts = []
    for members in (members for rank in plan for members in rank):
        batch = pack([answers[i] for i in members])
        loss_N = torch.cat([torch.empty(0, dtype=torch.float64), *(losses[i] for i in members)])
        parts.append((weights[members][batch.answer_N] * loss_N).sum().item() / denominator)
    assert sum(parts) == pytest.approx(expected, rel=1e-12)
