"""Every family on the real Megatron model against transformers: logits, gradients and export, under several layouts.

The reference is transformers' own model, with gradients in float64. Each layout is one task for all models.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from family_worker import Layout, make_packs, measure, train
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, save_tiny, tiny_model

DENSE = {"alone": Layout(), "tensor 4": Layout(4, tensor=4), "tensor 2 × pipeline 2": Layout(4, tensor=2, pipeline=2)}
EXPERT = {
    "tensor 2 × expert 2": Layout(4, tensor=2, expert=2),
    "pipeline 2 × expert 2": Layout(4, pipeline=2, expert=2),
    "expert 2 of data 4": Layout(4, expert=2),
}
SLOW = ("tensor 4", "expert 2 of data 4")
CASES = [
    pytest.param(name, layout, marks=[pytest.mark.slow] if layout in SLOW else [])
    for layout in {**DENSE, **EXPERT}
    for name in FAMILIES
    if layout in DENSE or "moe" in name
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The tiny models, with transformers' logits and gradients of Σ weight · log-prob, next to their weights."""
    root = tmp_path_factory.mktemp("families")
    folders = {}
    for name in FAMILIES:
        folders[name] = save_tiny(name, root / name)
        model = tiny_model(name, torch.float64)
        logits, loss = {}, torch.zeros((), dtype=torch.float64)
        for number, pack in enumerate(make_packs()):
            logits_NV = torch.cat([model(pack.ids_T[None, start:stop]).logits[0, :-1] for start, stop in pack.bounds])
            logprob_N = logits_NV.log_softmax(-1).gather(1, pack.targets_N[:, None])[:, 0]
            loss = loss + (pack.weights_N * logprob_N).sum()
            logits[str(number)] = logits_NV.detach().float()
        loss.backward()
        save_file(logits, folders[name] / "logits.safetensors")
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        save_file(as_in_files(gradients), folders[name] / "gradients.safetensors")
    return folders


def as_in_files(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 holds the experts of a layer in two tensors, where files have three of every expert."""
    result = {}
    for name, tensor in tensors.items():
        prefix, experts, part = name.partition(".experts.")
        if not experts:
            result[name] = tensor
            continue
        kinds = ("gate", "up") if part == "gate_up_proj" else ("down",)
        for number, of_expert in enumerate(tensor):
            for kind, rows in zip(kinds, of_expert.chunk(len(kinds)), strict=True):
                result[f"{prefix}.experts.{number}.{kind}_proj.weight"] = rows.contiguous()
    return result


@pytest.fixture(scope="module")
def measured(world, folders, tmp_path_factory):
    """Where a layout left its numbers; it runs when first asked for."""
    done: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in done:
            out = done[name] = tmp_path_factory.mktemp("layout")
            models = {key: folder for key, folder in folders.items() if name in DENSE or "moe" in key}
            layout = {**DENSE, **EXPERT}[name]
            world(layout.num_processes)(measure, models, out, layout)
        return done[name]

    return of


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logits_gradients_and_export_are_those_of_transformers(folders, measured, name, layout):
    out = measured(layout)
    result = json.loads((out / f"{name}.json").read_text())
    assert len(result["logits"]) > 0
    assert max(result["logits"]) < 1e-4
    assert result["export_differs"] == []
    ours, theirs = load_file(out / f"{name}.safetensors"), load_file(folders[name] / "gradients.safetensors")
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        # q, k and v are one parameter of Megatron's; k's bias alone has nearly no gradient, as softmax ignores shifts
        scale = max(theirs[re.sub("[qkv]_proj", f"{part}_proj", key)].abs().max() for part in "qkv")
        error = float((gradient - theirs[key]).abs().max() / scale)
        assert error < 1e-5, f"{key}: {error:.1e}"


def test_experts_learn_alike_and_resume_under_another_layout(world, folders, tmp_path):
    runs = {
        "alone": (Layout(), None),
        "spread": (EXPERT["tensor 2 × expert 2"], None),
        "gathered": (Layout(), tmp_path / "spread" / "checkpoint"),
        "scattered": (EXPERT["expert 2 of data 4"], tmp_path / "alone" / "checkpoint"),
    }
    third, norms = {}, {}
    for name, (layout, checkpoint) in runs.items():
        (tmp_path / name).mkdir()
        world(layout.num_processes)(train, folders["qwen3_moe"], tmp_path / name, layout, checkpoint)
        third[name] = load_file(tmp_path / name / "third.safetensors")
        norms[name] = json.loads((tmp_path / name / "norms.json").read_text())
    for name in ("alone", "spread"):
        again = load_file(tmp_path / name / "again.safetensors")
        assert all(torch.equal(tensor, again[key]) for key, tensor in third[name].items()), "restored, it continues bit for bit"
    start = load_file(folders["qwen3_moe"] / "model.safetensors")
    for name in ("spread", "gathered", "scattered"):
        assert third[name].keys() == start.keys()
        assert norms[name][-1] == pytest.approx(norms["alone"][-1], rel=1e-6)
        for key, tensor in third[name].items():
            moved = (third["alone"][key] - start[key]).abs().max()
            assert (tensor - third["alone"][key]).abs().max() < 0.01 * moved, key
