"""One recorded step under every layout: losses, all gradients and the new weights are the same, and they are the paper's.

The reference is Eq. 10 written out over transformers' model in float64, one answer at a time, and AdamW in float64. That
Megatron-Core's own model says the same, each sequence alone through its own attention, without packing or any parallelism, is
``test_megatrons_own_attention_agrees``.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from launcher import World
from megatron_alone import alone_in_megatron
from parity_worker import MUTATIONS, Run, measure
from recorded_step import ADAM, ALGORITHMS, LAYOUTS, NUM_UPDATES, REPRESENTATIVE, Layout, members, paper_loss, write_config
from safetensors.torch import load_file
from slow import slow_beside
from transformers import Qwen2ForCausalLM


@dataclass(frozen=True)
class Outcome:
    gradients: list[dict[str, torch.Tensor]]
    losses: list[tuple[float, float]]
    weights: dict[str, torch.Tensor]
    grad_norm: float
    num_empty: int = 0


def outcomes(world: World, configs: list[Path], ledger: Path, mutation: str | None = None) -> list[Outcome]:
    runs = [Run(config, ledger, config.parent / "out") for config in configs]
    world(measure, runs, mutation)
    return [read_outcome(run.out) for run in runs]


def read_outcome(out: Path) -> Outcome:
    stats = json.loads((out / "stats.json").read_text())
    return Outcome(
        gradients=[load_file(out / f"gradient_{i}.safetensors") for i in range(NUM_UPDATES)],
        losses=[(update["positive"], update["negative"]) for update in stats["updates"]],
        weights=load_file(out / "weights.safetensors"),
        grad_norm=stats["grad_norm"],
        num_empty=stats["num_empty"],
    )


def paper(model_folder: Path, ledger: Path, algorithm: str = "nft", recomputes: bool = True) -> Outcome:
    """What Eq. 10 says of transformers' model in float64, and the weights after AdamW on the first mini-batch."""
    model = Qwen2ForCausalLM.from_pretrained(model_folder, dtype=torch.float64)

    def logprobs_of(prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits = model(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    gradients, losses = [], []
    for groups in members(step=1):
        positive, negative = paper_loss(logprobs_of, ledger, groups, algorithm, recomputes)
        model.zero_grad()
        (positive + negative).backward()
        losses.append((float(positive.detach()), float(negative.detach())))
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    norm = float(torch.nn.utils.get_total_norm(gradients[0].values()))
    scale = min(1.0, ADAM["clip_grad"] / (norm + 1e-6))
    weights = {}
    for name, parameter in model.named_parameters():
        gradient = gradients[0][name] * scale
        decay = ADAM["weight_decay"] if parameter.dim() > 1 else 0.0
        weights[name] = parameter.detach() - ADAM["learning_rate"] * (
            gradient / (gradient.abs() + ADAM["epsilon"]) + decay * parameter.detach()  # the first update: m̂ = g, v̂ = g²
        )
    return Outcome(gradients, losses, weights, norm)


@pytest.fixture(scope="module")
def expected(models, ledger) -> dict[str, Outcome]:
    return {kind: paper(folder, ledger) for kind, folder in models.items()}


def gradient_error(measured: Outcome, reference: Outcome) -> tuple[float, str]:
    """The worst gradient tensor: its largest difference as a part of its largest entry, and its name.

    q, k and v are one parameter of Megatron's; k's bias alone has nearly no gradient, as softmax ignores shifts.
    """
    errors = []
    for ours, theirs in zip(measured.gradients, reference.gradients, strict=True):
        assert ours.keys() == theirs.keys() - ({"lm_head.weight"} - ours.keys())
        assert len(ours) >= 31
        for name, gradient in ours.items():
            together = [re.sub("[qkv]_proj", f"{part}_proj", name) for part in "qkv"]
            scale = max(theirs[other].abs().max() for other in together)
            errors.append((float((gradient - theirs[name]).abs().max() / scale), name))
    return max(errors)


def assert_equal(measured: Outcome, reference: Outcome) -> None:
    for ours, theirs in zip(measured.losses, reference.losses, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6 * sum(map(abs, theirs)))
    error, name = gradient_error(measured, reference)
    assert error < 1e-5, f"{name}: {error:.1e}"
    assert measured.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5)
    for name, weight in measured.weights.items():
        step = reference.weights[name]
        assert (weight - step).abs().max() < 1e-6 * max(1.0, float(step.abs().max())), name


@pytest.mark.parametrize("name", slow_beside(LAYOUTS, REPRESENTATIVE))
def test_every_layout_computes_the_papers_step(world, models, ledger, expected, tmp_path, name):
    layout = LAYOUTS[name]
    configs = [write_config(tmp_path / kind, folder, layout) for kind, folder in models.items()]
    for kind, measured in zip(models, outcomes(world(layout.num_processes), configs, ledger), strict=True):
        assert_equal(measured, expected[kind])


@pytest.fixture(scope="module")
def expected_of_all(models, ledger) -> dict[str, Outcome]:
    return {name: paper(models["untied"], ledger, name) for name in ALGORITHMS}


@pytest.mark.parametrize(
    "name", slow_beside(["alone", "tensor 2", "pipeline 2 interleaved", "data 2", "context 2"], ["alone", "context 2"])
)
def test_every_algorithm_computes_its_papers_step(world, models, ledger, expected_of_all, tmp_path, name):
    """Losses of tokens and of whole groups of answers, the latter's tokens on several context ranks."""
    configs = [
        write_config(tmp_path / str(i), models["untied"], LAYOUTS[name], algorithm) for i, algorithm in enumerate(ALGORITHMS)
    ]
    measured_of_all = outcomes(world(LAYOUTS[name].num_processes), configs, ledger)
    for algorithm, measured in zip(ALGORITHMS, measured_of_all, strict=True):
        assert_equal(measured, expected_of_all[algorithm])


def test_megatrons_own_attention_agrees(world, models, ledger, expected, tmp_path):
    """Each sequence alone through an unmodified GPTModel with Megatron-Core's own attention and rotary positions."""
    for kind, model in models.items():
        world(1)(alone_in_megatron, model, ledger, tmp_path / kind)
        for i, reference in enumerate(expected[kind].gradients):
            measured = load_file(tmp_path / kind / f"gradient_{i}.safetensors")
            assert len(measured) >= 31
            for name, gradient in measured.items():
                largest = max(reference[re.sub("[qkv]_proj", f"{part}_proj", name)].abs().max() for part in "qkv")
                assert (gradient - reference[name]).abs().max() / largest < 1e-5, name


def test_right_answers_alone_leave_ranks_without_a_token(world, models, ledger, tmp_path):
    """RFT on more data ranks than right answers: some hold a pack without any loss token."""
    config = write_config(tmp_path / "rft", models["tied"], Layout(8), algorithm="rft")
    (measured,) = outcomes(world(8), [config], ledger)
    assert measured.num_empty > 0
    assert_equal(measured, paper(models["tied"], ledger, "rft"))


@pytest.mark.parametrize(
    "several", ["tensor 2 × context 2", pytest.param("tensor 2 × pipeline 2 × context 2", marks=pytest.mark.slow)]
)
def test_bfloat16_is_within_its_own_noise(world, models, ledger, expected, tmp_path, several):
    """Parallel bfloat16 is as far from float64 as one process is, to a factor that rounding in another order explains."""
    errors = {}
    for name in ("alone", several):
        layout = LAYOUTS[name]
        config = write_config(tmp_path / name / "untied", models["untied"], layout, dtype="bfloat16")
        (measured,) = outcomes(world(layout.num_processes), [config], ledger)
        errors[name] = gradient_error(measured, expected["untied"])[0]
    alone, parallel = errors.values()
    assert 1e-3 < alone < 0.1, "bfloat16 has 8 significant bits"
    assert parallel < 2 * alone


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_faults_of_others_would_be_found(world, models, ledger, expected_of_all, tmp_path, mutation):
    """Each planted fault moves a gradient by a hundred times the tolerance and more."""
    algorithm, layout = (
        "infonca" if "whole answers" in mutation else "nft",
        LAYOUTS["data 2" if "data" in mutation else "context 2"],
    )
    config = write_config(tmp_path / "mutated", models["untied"], layout, algorithm)
    (measured,) = outcomes(world(layout.num_processes), [config], ledger, mutation)
    assert gradient_error(measured, expected_of_all[algorithm])[0] > 1e-3
