"""The stage of gpu_check.py that trains: updates of a random model of any size, on whatever device there is.

The model lies in a folder and the step in a ledger; everything else is the package's own: build, prepare, update, snapshot,
write, load, fingerprint. One mini-batch is trained again and again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from train_step import ANSWERS_PER_GROUP, PROMPT_TOKENS, Clock, peak_memory, shape_of, sums_of, write_step

from nft_megatron.batching.batch import MiniBatch
from nft_megatron.config.load import load_config
from nft_megatron.config.schema import Config
from nft_megatron.model.step import Trainer
from nft_megatron.plan.compute import model_flops
from nft_megatron.plan.hardware import ACCELERATORS
from nft_megatron.plan.layouts import Cluster, ParallelLayout, layout_of
from nft_megatron.plan.memory import stage_memory
from nft_megatron.plan.time import train_time
from nft_megatron.run.build import build_trainer
from nft_megatron.run.join import init_distributed
from nft_megatron.weights import ModelShape, read_shape, weight_table
from nft_megatron.weights.fingerprint import weights_fingerprint
from nft_megatron.weights.hf_writer import write_hf_folder

NUM_UPDATES = 3
MAX_KERNELS = 25


def write_model(folder: Path, shape: ModelShape) -> Path:
    """A Hugging Face folder of random weights in bfloat16."""
    if folder.exists():  # an earlier stage's
        return folder
    source, unfinished = folder.with_name(f"{folder.name} sizes"), folder.with_name(f"{folder.name} unfinished")
    for made in (source, unfinished):
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
    sizes = {
        "architectures": [shape.architecture],
        "model_type": "qwen2",
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "vocab_size": shape.vocab_size,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_theta,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tied_embeddings,
    }
    (source / "config.json").write_text(json.dumps(sizes))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, size in weight_table(shape).shapes.items():
            tensor = torch.ones(size, device=device)
            if "norm" not in name:
                tensor.normal_(std=0.02, generator=generator)
            yield name, tensor.bfloat16()

    write_hf_folder(unfinished, weights(), source)
    return unfinished.rename(folder)


def write_run(options: argparse.Namespace) -> tuple[Path, Path]:
    """Ledger and configuration of a step of ``options.packs`` packs of ``options.tokens`` tokens."""
    shape, folder = shape_of(options.shape), options.folder / options.key
    folder.mkdir()
    mean_answer = options.tokens // 10
    prompt = min(PROMPT_TOKENS, options.tokens // 8)
    ledger = folder / "step_000001.parquet"
    write_step(ledger, shape.vocab_size, options.packs * options.tokens, mean_answer, prompt)
    tree = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(write_model(options.folder / "models" / options.shape, shape)), "dtype": options.dtype},
        "data": {"train": "not read", "max_prompt_tokens": prompt},
        "rollout": {"questions_per_step": 1, "group_size": ANSWERS_PER_GROUP, "max_answer_tokens": max(16, 4 * mean_answer)},
        "optimizer": {"learning_rate": 1e-6, "warmup_updates": 0, "cpu_offload": options.offload},
        "train": {"num_steps": 1, "updates_per_step": 1, "micro_batch_tokens": options.tokens},
    }
    config = folder / "config.yaml"
    config.write_text(json.dumps(tree))  # which is YAML too
    return ledger, config


def train(options: argparse.Namespace, facts: Any) -> None:
    """Updates of a random model: tokens/s, utilisation, memory beside the plan, kernels, checkpoint, fingerprint."""
    ledger, path = write_run(options)
    config = load_config(path, options.set)
    shape = read_shape(config.model.path)
    with init_distributed(config) as topology:
        device = topology.device
        clock = Clock(device)
        before = peak_memory(device, reset=True)
        trainer = clock.timed("build", build_trainer, config, topology, shape)
        clock.timed("first old log-probs", trainer.prepare, ledger, 1)
        batch = clock.timed("old log-probs", trainer.prepare, ledger, 1)
        (minibatch,) = batch.minibatches
        clock.timed("first update", trainer.update, minibatch)
        times = []
        for _ in range(NUM_UPDATES):
            start = clock.now()
            trainer.update(minibatch)
            times.append(clock.now() - start)
        clock.seconds["update"] = statistics.median(times)
        layers = trainer.chunks[0].config
        facts.add(
            layers=layers.transformer_impl,
            gradient_accumulation_fusion=layers.gradient_accumulation_fusion,
            adam=type(trainer.optimizer.megatron.chained_optimizers[0].optimizer).__module__,
            seconds=clock.seconds,
            **_speed(config, shape, minibatch, clock.seconds["update"], device),
        )
        facts.add(**_memory(config, shape, minibatch, peak_memory(device) - (0 if device.type == "cuda" else before), device))
        speed, memory = facts.known, facts.known["memory"]
        shows = f"{layers.transformer_impl} layers, {speed['tokens_per_second']:,.0f} tokens/s"
        shows += f", MFU {speed['mfu']:.1%}" if speed["mfu"] else ""
        shows += f", peak {memory['peak'] / 1e9:.2f} GB (plan {memory['planned'] / memory['peak']:.2f} of it)"
        facts.add(shows=shows)
        if options.profile:
            facts.add(kernels=_kernels(trainer, minibatch))
        if options.save:
            _checkpoint(trainer, minibatch, options.folder / f"{options.key}-checkpoint", clock, facts)
        del trainer, batch, minibatch


def _speed(config: Config, shape: ModelShape, minibatch: MiniBatch, seconds: float, device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    gpu = next((gpu for kind, gpu in ACCELERATORS.items() if kind.split("-")[0] in name.lower() and gpu.is_gpu), None)
    packs = sums_of([micro_batch.packed for micro_batch in minibatch.micro_batches])
    flops = model_flops(shape, packs.tokens, packs.pairs, packs.positions)
    found = {"packs": asdict(packs), "tokens_per_second": packs.tokens / seconds, "flops_per_second": flops / seconds}
    if gpu is None:
        return found | {"mfu": None, "planned_update_seconds": None}
    cluster, dtype, offload = Cluster(gpu, 1, 1, 0), config.model.dtype, config.optimizer.cpu_offload
    planned = train_time(shape, layout_of(config, cluster), cluster, packs, num_updates=1, dtype=dtype, cpu_offload=offload)
    mfu = flops / seconds / gpu.flops_of(dtype)
    return found | {"mfu": mfu, "planned_update_seconds": planned.total - planned.old_logprobs}


def _memory(config: Config, shape: ModelShape, minibatch: MiniBatch, peak: int, device: torch.device) -> dict[str, Any]:
    """``planned`` is comparable with ``peak``: on a GPU without the runtime, which torch's allocator does not see."""
    on_gpu = device.type == "cuda"
    layout = ParallelLayout(1, 1, 1, 1, 1, True, config.model.recompute, config.train.micro_batch_tokens)
    options = {"dtype": config.model.dtype, "on_gpu": on_gpu, "num_micro_batches": len(minibatch.micro_batches)}
    plan = stage_memory(shape, layout, 0, cpu_offload=config.optimizer.cpu_offload, **options)
    memory: dict[str, Any] = {"peak": peak, "planned": plan.peak - (plan.runtime if on_gpu else 0), "plan": asdict(plan)}
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        memory |= {"reserved": torch.cuda.max_memory_reserved(), "runtime": total - free - reserved}
    return {"memory": memory}


def _kernels(trainer: Trainer, minibatch: MiniBatch) -> list[dict[str, Any]]:
    """What takes the most time in an update, with its share of all kernels' time."""
    on_gpu = trainer.topology.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        trainer.update(minibatch)
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = [(getattr(event, field), event.count, event.key) for event in profiled.key_averages()]
    total = sum(time for time, _, _ in rows) or 1
    return [{"share": time / total, "calls": count, "kernel": key} for time, count, key in sorted(rows)[::-1][:MAX_KERNELS]]


def _checkpoint(trainer: Trainer, minibatch: MiniBatch, folder: Path, clock: Clock, facts: Any) -> None:
    """Seconds of a checkpoint and of the fingerprint; whether an update repeats to the bit after loading the checkpoint."""
    folder.mkdir()
    snapshot = clock.timed("snapshot", trainer.snapshot, 1)
    clock.timed("write", snapshot.write, folder, trainer.topology)
    del snapshot
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    clock.timed("fingerprint", lambda: weights_fingerprint(trainer.hf_tensors()))
    seconds = clock.seconds
    shows = f"{facts.known['shows']}; checkpoint of {num_bytes / 1e9:.2f} GB: snapshot {seconds['snapshot']:.1f} s, written in "
    shows += f"{seconds['write']:.1f} s"
    facts.add(checkpoint_bytes=num_bytes, seconds=seconds, shows=shows)
    first = trainer.update(minibatch).applied.grad_norm, _bits(trainer)
    clock.timed("load", trainer.load, folder)
    again = trainer.update(minibatch).applied.grad_norm, _bits(trainer)
    shutil.rmtree(folder)
    repeats, deterministic = first == again, trainer.chunks[0].config.deterministic_mode
    shows += f", loaded in {seconds['load']:.1f} s; fingerprint {seconds['fingerprint']:.1f} s; after loading an update "
    shows += "repeats to the bit" if repeats else f"differs by {abs(first[0] / again[0] - 1):.1e} of ‖g‖"
    facts.add(seconds=seconds, deterministic=deterministic, repeats_to_the_bit=repeats, shows=shows)
    facts.add(grad_norms=(first[0], again[0]))
    assert repeats or not deterministic, "under kernels.deterministic an update does not repeat to the bit"


def _bits(trainer: Trainer) -> list[int]:
    """The sum of the bits of every master weight and moment, as integers: equal states have equal sums."""
    with trainer.optimizer.state_on_device():
        tensors = [
            tensor.detach().view(torch.int32)
            for optimizer in trainer.optimizer.megatron.chained_optimizers
            for parameter, moments in optimizer.optimizer.state.items()
            for tensor in (parameter, moments["exp_avg"], moments["exp_avg_sq"])
        ]
        return torch.stack([tensor.sum(dtype=torch.int64) for tensor in tensors]).tolist()
