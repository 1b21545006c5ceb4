"""What comes after the updates of a step, each part checked against the others, and how two devices' steps are compared.

Used by rehearsal_worker.py on a pretended GPU and by benchmarks/gpu_check.py on a real one.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from nft_megatron.model.step import Trainer
from nft_megatron.model.weight_gathering import gather_weights
from nft_megatron.rollout.fleet.broadcast import fill_buckets, open_bucket
from nft_megatron.run.weight_sync import WeightSync
from nft_megatron.weights.fingerprint import weights_fingerprint

BUCKET_BYTES = 4096
"""Of a broadcast: small enough for several."""

TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-5}
"""Largest relative difference between the metrics of two devices."""


def everything_else(trainer: Trainer, ledger: Path, model: Path, out: Path) -> dict[str, Any]:
    """Cosine, snapshot, write, load, export, publish: what of it went wrong. The weights end as they began."""
    topology = trainer.topology
    before = state_of(trainer)
    checkpoint = out / "checkpoint"
    if topology.is_main:
        checkpoint.mkdir()
    dist.barrier(group=topology.control_group)
    trainer.snapshot(1).write(checkpoint, topology)
    measuring = replace(trainer, gradient_cosine_every=1)
    cosine = measuring.update(measuring.prepare(ledger, 1).minibatches[0]).gradient_cosine
    moved = [name for name, value in state_of(trainer).items() if not torch.equal(value, before[name])]
    assert trainer.load(checkpoint) == 1
    after = state_of(trainer)
    result: dict[str, Any] = {
        "cosine": cosine,
        "num_moved": len(moved),
        "load_differs": [str(name) for name, value in after.items() if not torch.equal(value, before[name])],
        "mismatch": trainer.mismatch(ledger, 1),
    }
    WeightSync(trainer, None, model).export(out / "hf")
    result["fingerprint"] = weights_fingerprint(trainer.hf_tensors())
    stream = trainer.hf_tensors()
    buckets = [
        [(name, tensor.cpu().clone()) for name, tensor in open_bucket(slots, flat)]
        for slots, flat in fill_buckets(stream, BUCKET_BYTES, topology.device)
    ]
    result["num_broadcast_buckets"] = len(buckets)
    result["broadcast"] = weights_fingerprint(item for bucket in buckets for item in bucket)
    if topology.is_main:
        result["exported"] = weights_fingerprint(load_file(out / "hf" / "model.safetensors").items())
    return result


def state_of(trainer: Trainer) -> dict[tuple[int, int, str], torch.Tensor]:
    """Weights, masters and moments of this rank, copied to the host."""
    gather_weights(trainer.chunks)
    state = {}
    with trainer.optimizer.state_on_device():
        for i, optimizer in enumerate(trainer.optimizer.megatron.chained_optimizers):
            for j, (parameter, moments) in enumerate(optimizer.optimizer.state.items()):
                named = {name: moments[name] for name in ("exp_avg", "exp_avg_sq")} | {"master": parameter.detach()}
                state |= {(i, j, name): tensor.to("cpu", copy=True) for name, tensor in named.items()}
    for i, chunk in enumerate(trainer.chunks):
        state |= {(i, 0, name): p.detach().to("cpu", copy=True) for name, p in chunk.named_parameters()}
    return state


def distance(ours: Path, theirs: Path, first: Path) -> float:
    """How far the weights in ``ours`` are from those in ``theirs``, as a part of how far these are from the ``first`` ones."""
    weights, reference, start = (load_file(path) for path in (ours, theirs, first))
    assert weights.keys() == reference.keys()

    def norm(others: dict[str, torch.Tensor]) -> float:
        return float(sum((reference[key].double() - others[key].double()).square().sum() for key in reference)) ** 0.5

    return norm(weights) / norm(start)


def differing_metrics(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> list[str]:
    """The metrics of a step in which two results of this module's users differ, as "name: ours, theirs"."""
    names = ("loss_positive", "loss_negative", "grad_norm", "kl_old")
    pairs = {name: (ours["summary"][name], theirs["summary"][name], tolerance / 10) for name in names}
    pairs["entropy"] = (ours["summary"]["entropy"], theirs["summary"]["entropy"], 1e-12)
    return [
        f"{name}: {a}, {b}" for name, (a, b, least) in pairs.items() if not math.isclose(a, b, rel_tol=tolerance, abs_tol=least)
    ]
