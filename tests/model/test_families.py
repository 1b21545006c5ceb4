"""Every family on the real Megatron model against transformers: logits, gradients and export, under several layouts."""

import json
import re
from pathlib import Path

import pytest
import torch
from family_worker import make_packs, measure
from launcher import Ranks
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, save_tiny, tiny_model

LAYOUTS = {"alone": (1, 1, 1), "tensor 4": (4, 1, 4), "tensor 2 × pipeline 2": (2, 2, 4), "data 2": (1, 1, 2)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The tiny models with transformers' logits and, in float64, gradients of Σ weight · log-prob."""
    root = tmp_path_factory.mktemp("families")
    folders = {}
    for name in FAMILIES:
        folders[name] = save_tiny(name, root / name)
        model = tiny_model(name, torch.float64)
        logits, loss = {}, torch.zeros((), dtype=torch.float64)
        for number, pack in enumerate(make_packs()):
            rows = []
            for start, stop in zip(pack.starts, pack.starts[1:], strict=False):
                rows.append(model(pack.ids_T[None, start:stop]).logits[0, :-1])
            logits_NV = torch.cat(rows)
            targets_N = pack.ids_T[pack.loss_positions_N + 1]
            loss = loss + (pack.weights_N * logits_NV.log_softmax(-1).gather(1, targets_N[:, None])[:, 0]).sum()
            logits[str(number)] = logits_NV.detach().float()
        loss.backward()
        save_file(logits, folders[name] / "logits.safetensors")
        save_file(_as_in_files({key: p.grad for key, p in model.named_parameters()}), folders[name] / "gradients.safetensors")
    return folders


def _as_in_files(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 holds the experts of a layer in two tensors, where files have three of every expert."""
    result = {}
    for name, tensor in tensors.items():
        prefix, experts, part = name.partition(".experts.")
        if not experts:
            result[name] = tensor
        for number, of_expert in enumerate(tensor) if experts else ():
            rows = of_expert.chunk(2) if part == "gate_up_proj" else (of_expert,)
            names = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
            for kind, row in zip(names, rows, strict=True):
                result[f"{prefix}.experts.{number}.{kind}.weight"] = row.contiguous()
    return result


@pytest.fixture(scope="module")
def outcome(folders, tmp_path_factory):
    """Where a layout left its numbers; it runs when first asked for."""
    done: dict[str, Path] = {}

    def of(layout: str) -> Path:
        if layout not in done:
            out = tmp_path_factory.mktemp("layout")
            tensor, pipeline, num_processes = LAYOUTS[layout]
            ended = Ranks(measure, (folders, out, tensor, pipeline), num_processes, out).wait()
            assert ended.returncode == 0, ended.stderr
            done[layout] = out
        return done[layout]

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_gradients_and_export_are_those_of_transformers(folders, outcome, name, layout):
    out = outcome(layout)
    result = json.loads((out / f"{name}.json").read_text())
    assert max(result["logits"]) < 1e-4
    assert result["export_differs"] == []
    ours, theirs = load_file(out / f"{name}.safetensors"), load_file(folders[name] / "gradients.safetensors")
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        # q, k and v are one parameter of Megatron's; k's bias alone has nearly no gradient, as softmax ignores shifts
        scale = max(theirs[re.sub("[qkv]_proj", f"{part}_proj", key)].abs().max() for part in "qkv")
        error = float((gradient - theirs[key]).abs().max() / scale)
        assert error < 1e-5, f"{key}: {error:.1e}"
