"""Every algorithm's loss and gradient against its paper's objective, written out over whole questions in float64."""

import pytest
import torch
from literal import literal_loss

from nft_megatron.algorithms import ALGORITHMS, AnswerBatch, TokenBatch, build_algorithm

LIMIT = 12
VARIANTS = {
    "nft": ("nft", {}),
    "nft, ω 1, ε 0.1": ("nft", {"prompt_weight": "one", "epsilon": 0.1}),
    "nft, ω sqrt, negatives 0.5": ("nft", {"prompt_weight": "sqrt_odds", "epsilon": 0.5, "negative_weight": 0.5}),
    "nft, whole answers": ("nft", {"ratio_type": "sequence"}),
    "nft, whole answers, ω sqrt, ε 0.1": ("nft", {"ratio_type": "sequence", "prompt_weight": "sqrt_odds", "epsilon": 0.1}),
    "nft, r̂ in [0.3, 0.7]": ("nft", {"rate_margin": 0.3, "negative_weight": 0.5}),
    "rft": ("rft", {}),
    "grpo": ("grpo", {}),
    "grpo as first published": ("grpo", {"clip_high": 0.2, "per_answer_mean": True}),
    "dr_grpo": ("dr_grpo", {"clip_low": 0.1}),
    "dapo": ("dapo", {}),
    "dapo, half of the limit": ("dapo", {"overlong_buffer": 0.5, "overlong_penalty": 0.7}),
    "gspo": ("gspo", {}),
    "gspo, a wide clip": ("gspo", {"clip_low": 0.1, "clip_high": 0.2}),
    "cispo": ("cispo", {}),
    "cispo, a narrow clip": ("cispo", {"max_ratio": 1.2}),
    "infonca": ("infonca", {}),
    "infonca without supervision": ("infonca", {"beta": 0.5, "sft_weight": 0.0}),
}


def questions(seed, num_questions=7, num_answers=6):
    """Old and new log-probs of answers of unequal lengths; every question has right and wrong ones."""
    generator = torch.Generator().manual_seed(seed)

    def randint(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(num_questions):
        lengths = [randint(1, LIMIT + 1) for _ in range(num_answers)]
        old = [-torch.rand(length, dtype=torch.float64, generator=generator) * 3 for length in lengths]
        new = [(each + 0.5 * torch.randn(len(each), dtype=torch.float64, generator=generator)).requires_grad_() for each in old]
        num_right = randint(1, num_answers)
        correct = [k < num_right for k in torch.randperm(num_answers, generator=generator).tolist()]
        yield new, old, correct, [length == LIMIT or randint(0, 8) == 0 for length in lengths]


def ours(algorithm, asked):
    """Σ ω·ℓ over all questions, every token of them in one batch, in an order that mixes the answers."""
    new, old, correct, truncated = ([each for question in asked for each in question[i]] for i in range(4))
    group_A = torch.arange(len(asked)).repeat_interleave(torch.tensor([len(question[0]) for question in asked]))
    correct_A = torch.tensor(correct)
    counts = torch.bincount(group_A).double()
    rate_A = (torch.bincount(group_A, correct_A.double()) / counts)[group_A]
    length_A = torch.tensor([len(each) for each in new])
    answers = AnswerBatch(group_A, correct_A, rate_A, length_A, torch.tensor(truncated), length_limit=LIMIT)
    weight_A, advantage_A = algorithm.weight(answers), algorithm.advantage(answers)
    answers = answers._replace(weight_A=weight_A, advantage_A=advantage_A)
    if algorithm.coupling != "token":
        log_ratio_A = torch.stack([(a - b).sum() for a, b in zip(new, old, strict=True)])
        order = torch.randperm(len(new), generator=torch.Generator().manual_seed(0))
        shuffled = answers.take(order)
        return (shuffled.weight_A * algorithm.sequence_loss(shuffled, log_ratio_A[order])).sum()
    order = torch.randperm(int(length_A.sum()), generator=torch.Generator().manual_seed(0))
    answer_N = torch.arange(len(new)).repeat_interleave(length_A)[order]
    advantage_N = None if advantage_A is None else advantage_A[answer_N]
    batch = TokenBatch(torch.cat(new)[order], torch.cat(old)[order], correct_A[answer_N], rate_A[answer_N], advantage_N)
    return (weight_A[answer_N] * algorithm.token_loss(batch).loss_N).sum()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_are_the_papers(variant, seed):
    name, options = VARIANTS[variant]
    algorithm = build_algorithm(name, **options)
    asked = list(questions(seed))
    everything = algorithm.model_dump()
    expected = sum(
        sum(literal_loss(name, new, old, correct, truncated, LIMIT, everything)) for new, old, correct, truncated in asked
    )
    leaves = [each for question in asked for each in question[0]]
    expected_gradient = torch.cat(torch.autograd.grad(expected, leaves, retain_graph=True))
    loss = ours(algorithm, asked)
    gradient = torch.cat(torch.autograd.grad(loss, leaves))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert (gradient - expected_gradient).abs().max() < 1e-9 * expected_gradient.abs().max()


def test_every_algorithm_is_compared():
    assert {name for name, _ in VARIANTS.values()} == set(ALGORITHMS)
