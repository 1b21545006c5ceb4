"""A recorded step by the papers' formulas over transformers' model in float64, and how a trainer's outcome compares with it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from recorded_step import ADAM, NUM_UPDATES, members, paper_loss
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM


@dataclass(frozen=True)
class Outcome:
    gradients: list[dict[str, torch.Tensor]]
    losses: list[tuple[float, float]]
    weights: dict[str, torch.Tensor]
    grad_norm: float
    num_empty: int = 0


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
