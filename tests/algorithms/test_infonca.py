"""InfoNCA: DPO for two answers, its closed gradient, groups that do not touch each other."""

import pytest
import torch

from nft_megatron.algorithms import AnswerBatch, build_algorithm

FLOAT64 = torch.float64


def batch_of(log_ratio, correct, group):
    log_ratio_A, group_A = torch.tensor(log_ratio, dtype=FLOAT64), torch.tensor(group)
    ones_A = torch.ones_like(log_ratio_A)
    answers = AnswerBatch(group_A, torch.tensor(correct), ones_A / 2, ones_A, ones_A > 1, length_limit=8)
    return answers, log_ratio_A.requires_grad_()


@pytest.mark.parametrize("beta", [0.1, 0.02, 0.01])
@pytest.mark.parametrize(("right", "wrong"), [(0.0, 0.0), (3.0, -2.0), (-40.0, 15.0)])
def test_two_answers_are_dpo(beta, right, wrong):
    """−log σ(β (S_right − S_wrong)) and its gradient ∓β σ(−β (S_right − S_wrong))."""
    answers, log_ratio_A = batch_of([wrong, right], [False, True], [0, 0])
    loss = build_algorithm("infonca", beta=beta, sft_weight=0.0).sequence_loss(answers, log_ratio_A).sum()
    (gradient,) = torch.autograd.grad(loss, log_ratio_A)
    margin = torch.tensor(beta * (right - wrong), dtype=FLOAT64)
    assert loss.item() == pytest.approx(torch.nn.functional.softplus(-margin).item(), rel=1e-12)
    slope = beta * torch.sigmoid(-margin).item()
    assert gradient.tolist() == pytest.approx([slope, -slope], rel=1e-10)


def test_gradient_is_softmax_minus_target_and_the_supervised_part():
    answers, log_ratio_A = batch_of([1.0, -2.0, 0.5, 4.0], [True, False, True, False], [0, 0, 0, 0])
    loss = build_algorithm("infonca", beta=0.3, sft_weight=0.7).sequence_loss(answers, log_ratio_A).sum()
    (gradient,) = torch.autograd.grad(loss, log_ratio_A)
    target = torch.tensor([0.5, 0, 0.5, 0], dtype=FLOAT64)
    expected = 0.3 * (torch.softmax(0.3 * log_ratio_A.detach(), 0) - target) - 0.7 * target
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def test_questions_do_not_touch_each_other_in_any_order():
    values, correct, group = [1.0, 5.0, -2.0, 0.0, 3.0], [True, False, False, True, True], [1, 0, 1, 0, 1]
    algorithm = build_algorithm("infonca", beta=0.5)
    whole = algorithm.sequence_loss(*batch_of(values, correct, group))
    for number in (0, 1):
        own = [k for k in range(5) if group[k] == number]
        alone = algorithm.sequence_loss(*batch_of([values[k] for k in own], [correct[k] for k in own], [0] * len(own)))
        torch.testing.assert_close(whole[own], alone, rtol=1e-14, atol=0)


def test_long_answers_do_not_overflow_float32():
    answers, log_ratio_A = batch_of([-4000.0, 3000.0, 2990.0], [True, False, False], [0, 0, 0])
    log_ratio_A = log_ratio_A.detach().float().requires_grad_()
    loss = build_algorithm("infonca", beta=1.0, sft_weight=0.0).sequence_loss(answers, log_ratio_A).sum()
    (gradient,) = torch.autograd.grad(loss, log_ratio_A)
    assert loss.item() == pytest.approx(7000, rel=1e-6)
    assert gradient.tolist() == pytest.approx([-1.0, 1.0, 4.5e-5], rel=1e-2)


def test_no_answers_have_no_loss_and_a_gradient_all_the_same():
    """A data rank without work still runs its step."""
    empty = torch.zeros(0, dtype=FLOAT64, requires_grad=True)
    answers = AnswerBatch(empty.long(), empty > 0, empty.detach(), empty.detach(), empty > 0, length_limit=8)
    loss = build_algorithm("infonca").sequence_loss(answers, empty).sum()
    assert loss.item() == 0
    assert torch.autograd.grad(loss, empty)[0].shape == (0,)
