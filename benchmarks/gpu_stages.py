"""The stages of gpu_check.py, each in a process of its own: ``python benchmarks/gpu_stages.py STAGE --folder F --key KEY …``

A stage writes what it finds to F/KEY.json as it goes, so that one that is ended at its deadline leaves the rest; ``shows`` is
its line in the table. It raises where something is wrong. Each imports what it needs itself, after ``--without-te`` has hidden
Transformer Engine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))

GPU_DISTANCE = {"bfloat16": 0.3, "float32": 1e-3}
"""Largest distance of a GPU's weights from the CPU's, as a part of how far training moved them. Its kernels add in another
order; in bfloat16 weights are rounded to steps larger than most of an update. A gradient that lacks a part makes it about 1."""
GPU_TOLERANCE = {"bfloat16": 5e-2, "float32": 1e-3}
"""Largest relative difference of metrics."""


class Facts:
    """What a stage found, on disk after every addition."""

    def __init__(self, path: Path) -> None:
        self._path, self.known = path, {}  # type: ignore[var-annotated]

    def add(self, **found: Any) -> None:
        self.known |= found
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps(self.known, indent=1, default=str))
        temporary.rename(self._path)


def versions(options: argparse.Namespace, facts: Facts) -> None:
    """What is installed, what the doctor finds, and whether Transformer Engine's library runs on the device.

    What the doctor misses is no failure here: the check needs less than a run.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    facts.add(device=torch.cuda.get_device_name() if on_gpu else "cpu", on_gpu=on_gpu, torch=torch.__version__)
    from nft_megatron.cli import doctor

    found = doctor.findings()
    facts.add(doctor=[asdict(finding) for finding in found])
    engine = doctor.installed("transformer-engine-torch") or doctor.installed("transformer-engine")
    facts.add(megatron=doctor.installed("megatron-core"), transformer_engine=engine, cuda=torch.version.cuda)
    faults = [f"{finding.name} {finding.state}" for finding in found if finding.is_fault]
    missing = f"; the doctor misses: {', '.join(faults)}" if faults else ""
    facts.add(shows=f"torch {torch.__version__}, Megatron-Core {facts.known['megatron']}{missing}")
    if on_gpu:
        import torch.backends.cudnn as cudnn

        facts.add(cudnn=cudnn.version(), nccl=".".join(map(str, torch.cuda.nccl.version())))
        from nft_megatron.model import settings

        engine = engine if settings.gpt_layer_specs.HAVE_TE else None
        facts.add(transformer_engine=engine)
        if engine:
            error = _engine_error()
            facts.add(engine_error=error, shows=f"{facts.known['shows']}, Transformer Engine {engine}: error {error:.1e}")
            assert error < 2e-2


def _engine_error() -> float:
    """Relative, of Transformer Engine's norm and linear layer with their gradients, beside torch's in float32."""
    import torch
    import transformer_engine.pytorch as te

    layer = te.LayerNormLinear(256, 512, normalization="RMSNorm", bias=False, params_dtype=torch.bfloat16, device="cuda")
    inputs = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    output = layer(inputs)
    output.float().square().mean().backward()
    copy = inputs.detach().float().requires_grad_()
    normed = torch.nn.functional.rms_norm(copy, (256,), layer.layer_norm_weight.float(), layer.eps)
    expected = normed @ layer.weight.float().T
    expected.square().mean().backward()
    pairs = [(output, expected), (inputs.grad, copy.grad)]
    return max(float((ours.float() - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs)


def attention(options: argparse.Namespace, facts: Facts) -> None:
    """The attention without Transformer Engine, forward and backward, beside the CPU's on the same numbers."""
    from types import SimpleNamespace

    import torch

    from nft_megatron.model.attention import PackedAttention, rotary_cos_sin
    from nft_megatron.model.packed_sequences import attention_kind, pack_sequences

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths, dim = [5, 130, 64, 1, 300], 64
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(sum(lengths), heads, dim, generator=generator).bfloat16() for heads in (8, 2, 2)]
    positions = torch.cat([torch.arange(length) for length in lengths])
    frequencies = 1e4 ** (-torch.arange(0, dim, 2) / dim)
    results = []
    for place, dtype in ((torch.device("cpu"), torch.float32), (device, torch.bfloat16)):
        kind = attention_kind("local", dtype, place)
        packed = pack_sequences(lengths, place, attention=kind)
        packed.cos_T1D, packed.sin_T1D = rotary_cos_sin(positions.to(place), frequencies.to(place), dtype)
        qkv = [value.to(place, dtype).requires_grad_() for value in values]
        layer = PackedAttention(SimpleNamespace(kv_channels=dim), SimpleNamespace(cp=None))
        output = layer(*qkv, None, packed_seq_params=packed)
        output.float().square().mean().backward()
        results.append([tensor.detach().cpu().float() for tensor in (output, *(x.grad for x in qkv))])
    errors = [float((ours - theirs).abs().max() / theirs.abs().max()) for theirs, ours in zip(*results, strict=True)]
    shows = f"{kind}, on {device.type}: output and gradients within {max(errors):.1e} of float32"
    facts.add(kind=kind, errors=errors, shows=shows)
    assert max(errors) < 3e-2, errors


def recorded(options: argparse.Namespace, facts: Facts) -> None:
    """A whole recorded step, as the rehearsal runs it; with ``--reference`` beside another stage's."""
    from recorded_step import Layout, one_in_four_current, write_config, write_models, write_step
    from safetensors.torch import save_file
    from whole_step import differing_metrics, distance, everything_else

    from nft_megatron.config.load import load_config
    from nft_megatron.run.build import build_trainer
    from nft_megatron.run.join import init_distributed
    from nft_megatron.weights import read_shape

    folder = options.folder / "recorded"
    ledger, model, out = folder / "step_000001.parquet", folder / "models" / "tied", folder / options.key
    if not ledger.exists():  # the first of these stages
        write_models(folder / "models")
        write_step(ledger, one_in_four_current)
    config = load_config(write_config(out, model, Layout(1), dtype=options.dtype))
    with init_distributed(config) as topology:
        trainer = build_trainer(config, topology, read_shape(model))
        batch = trainer.prepare(ledger, 1)
        updates = [trainer.update(minibatch) for minibatch in batch.minibatches]
        result = {"summary": trainer.summary(batch, updates)}
        result |= everything_else(trainer, ledger, model, out)
        save_file({name: tensor.cpu() for name, tensor in trainer.hf_tensors()}, out / "weights.safetensors")
        facts.add(device=topology.device.type, layers=trainer.chunks[0].config.transformer_impl, **result)
        facts.add(adam=type(trainer.optimizer.megatron.chained_optimizers[0].optimizer).__module__)
        del trainer, batch
    shows = f"{facts.known['layers']} layers on {facts.known['device']}, ‖g‖ {result['summary']['grad_norm']:.5f}"
    facts.add(shows=shows)
    assert result["load_differs"] == [] and result["num_moved"] > 0, result["load_differs"]
    assert result["fingerprint"] == result["broadcast"] == result["exported"]
    if options.reference:
        reference = folder / options.reference / "weights.safetensors"
        assert reference.exists(), f"{options.reference}, to compare with, left no weights"
        apart = distance(out / "weights.safetensors", reference, model / "model.safetensors")
        theirs = json.loads((options.folder / f"{options.reference}.json").read_text())
        differing = differing_metrics(result, theirs, GPU_TOLERANCE[options.dtype])
        limit = GPU_DISTANCE[options.dtype]
        shows += f" (CPU {theirs['summary']['grad_norm']:.5f}), weights {apart:.1e} from the CPU's (limit {limit})"
        facts.add(distance=apart, differing=differing, shows=shows)
        assert apart <= limit and not differing, differing


def nccl(options: argparse.Namespace, facts: Facts) -> None:
    """The group that carries weights to servers, alone: buckets of a stream, broadcast, taken apart, and its end."""
    import time

    import torch
    import torch.distributed as dist

    from nft_megatron.rollout.fleet.broadcast import Group, fill_buckets, open_bucket

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    sizes = [options.tokens * 1000] * 4 + [7]
    stream = [(str(number), torch.randn(size, device=device).bfloat16()) for number, size in enumerate(sizes)]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = Group(store, 0, 1, device, 20.0)
    start, arrived = time.perf_counter(), 0
    for slots, flat in fill_buckets(stream, 3 * options.tokens * 1000, device):
        group.broadcast(flat)
        for name, tensor in open_bucket(slots, flat):
            assert torch.equal(tensor, stream[int(name)][1]), name
            arrived += tensor.nbytes
    seconds = time.perf_counter() - start
    group.close()
    kind = "NCCL" if device.type == "cuda" else "gloo"
    facts.add(bytes=arrived, seconds=seconds, shows=f"{arrived / 1e6:.0f} MB through {kind} in {seconds:.2f} s, closed")
    assert arrived == sum(tensor.nbytes for _, tensor in stream)


def train(options: argparse.Namespace, facts: Facts) -> None:
    """Updates of a random model; see gpu_training.py."""
    from gpu_training import train

    train(options, facts)


STAGES = {stage.__name__: stage for stage in (versions, attention, recorded, train, nccl)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--without-te", action="store_true")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--reference")
    parser.add_argument("--shape", default="mini")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--packs", type=int, default=2)
    parser.add_argument("--offload", type=float, default=0.0)
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="in the training's configuration")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    if options.without_te:
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    try:
        STAGES[options.stage](options, Facts(options.folder / f"{options.key}.json"))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # the process groups need no farewell


if __name__ == "__main__":
    main()
