"""A plan as a table for people, and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from nft_megatron.plan.estimate import Plan, TrainPlan
from nft_megatron.plan.hardware import ACHIEVABLE
from nft_megatron.plan.memory import FIT
from nft_megatron.plan.search import Search

COLUMNS = ("parameters", "gradients", "optimizer", "activations", "working", "lm_head", "runtime")


def report(plan: Plan, model: str) -> str:
    """The plan as text, about 110 characters wide. ``model`` says where its sizes come from."""
    return "\n\n".join([_run(plan, model), _memory(plan), _time(plan), _storage(plan)])


def _run(plan: Plan, model: str) -> str:
    work, cluster, layout, packs = plan.work, plan.training.cluster, plan.training.layout, plan.training.packs
    servers = plan.generation.servers
    if not servers.overlaps:
        split = f"all train; {servers.num} CPU processes generate"
    elif cluster.num_rollout:
        split = f"{cluster.num_trainers} train, {cluster.num_rollout} generate"
    else:
        split = f"all train; {servers.num_gpus} others generate"
    total = cluster.num_trainers + cluster.num_rollout
    size = f"{plan.num_parameters / 1e9:.2f} B" if plan.num_parameters > 1e8 else f"{plan.num_parameters / 1e6:.2f} M"
    return _pairs(
        [
            ("model", f"{size} parameters, from {model}"),
            ("GPUs", f"{total} {cluster.gpu.name}, {cluster.gpus_per_node} per node: {split}"),
            ("layout", f"{layout}{', sequence parallel' * (layout.sequence_shards > 1)}, recompute {layout.recompute}"),
            (
                "step",
                f"{work.num_updates} updates on {len(work.answer_lengths):,} answers each: {packs.num_micro_batches} packs of "
                f"{layout.micro_batch_tokens:,} tokens per data-parallel rank",
            ),
            (
                "assumed",
                f"answers of {work.mean_answer:,.0f} tokens, prompts of {work.prompt_tokens:,}; "
                f"{work.num_questions:,} questions (--answer-tokens, --mixed-share)",
            ),
        ]
    )


def _memory(plan: Plan) -> str:
    gpu, stages = plan.training.cluster.gpu, plan.training.stages
    unit, name = (1e9, "GB of 10^9") if plan.training.peak > 1e9 else (1e6, "MB of 10^6")
    rows = [["stage", *(column.replace("lm_head", "LM head") for column in COLUMNS), "peak", "of memory"]]
    rows.append(["", "exact", "exact", "exact", *["estimate"] * 5, ""])
    for stage in stages:
        parts = [*(getattr(stage, column) for column in COLUMNS), stage.peak]
        rows.append([str(stage.stage), *(f"{part / unit:.1f}" for part in parts), f"{stage.peak / gpu.memory:.0%}"])
    title = f"Memory per rank, {name} bytes ({gpu.name}: {gpu.memory / unit:,.0f}; a plan uses at most {FIT:.0%})"
    lines = [title, _table(rows), "Only the larger of working and LM head counts, because they follow each other."]
    offloaded = max(stage.offloaded for stage in stages)
    if offloaded:
        lines.append(f"{offloaded / unit:.1f} of the optimizer are on the host while activations live (optimizer.cpu_offload).")
    if not gpu.is_gpu:
        lines.append("Summing gradients needs a copy of them, while no activations live; glibc's allocator may add a third.")
    return "\n".join(lines)


def _time(plan: Plan) -> str:
    layout, packs, train = plan.training.layout, plan.training.packs, plan.training.time
    engines, servers, total = plan.generation, plan.generation.servers, plan.step_seconds
    note = (
        f"{servers.num} {'servers' if servers.overlaps else 'processes'} of {servers.gpus} {servers.gpu.name}, "
        f"{engines.num_running} answers at once, {engines.tokens_per_second:,.0f} tokens/s"
    )
    size, seconds = plan.better_tensor_parallel
    if seconds < 0.9 * plan.generate:
        note += f"; fleet.tensor_parallel={size} would take {seconds:,.0f} s"
    notes = {
        "old_logprobs": "at most: packs of older answers are left out" if plan.overlaps else "one forward pass over all packs",
        "backward": "including recomputation" if layout.recompute != "none" else "",
        "pipeline_bubble": f"{layout.pipeline} stages, {packs.num_micro_batches} micro-batches" if layout.pipeline > 1 else "",
        "data_communication": "what the backward pass does not hide",
    }
    parts = ", ".join(f"{name} {seconds:,.1f}" for name, seconds in plan.publish.parts.items())
    entries = [("generate", plan.generate, note), ("verify", plan.verify, "after generating")]
    entries += [
        (field.name.replace("_", " "), getattr(train, field.name), notes.get(field.name, ""))
        for field in fields(train)
        if getattr(train, field.name) or field.name not in ("expert_communication", "gradient_adds")
    ]
    entries += [
        ("publish weights", plan.publish.seconds, f"{plan.publish.path}: {parts}"),
        ("save", plan.save, "mean of all steps"),
    ]
    rows = [["", "seconds", "share", ""]]
    digits = 1 if total > 10 else 3
    rows += [[name, f"{seconds:,.{digits}f}", f"{seconds / total:.0%}", text] for name, seconds, text in entries]
    days = plan.num_steps * total / 86400
    run = f"{days:,.1f} days" if days > 2 else f"{24 * days:,.1f} hours"
    how = "; the next answers are generated while training (rollout.max_staleness)" if plan.overlaps else ""
    rows.append(["step", f"{total:,.{digits}f}", "", f"the whole run: {run}{how}"])
    rows.append(["", "", "", f"utilisation of the trainers in updates {plan.utilisation:.0%}"])
    title = (
        f"Time per rollout step, estimated by roofline (matrix products at {ACHIEVABLE.matmul:.0%} of their peak, attention "
        f"{ACHIEVABLE.attention:.0%}, memory {ACHIEVABLE.memory:.0%}, links {ACHIEVABLE.node:.0%};\n"
        f"while generating, weights are read at {ACHIEVABLE.decoding_weights:.0%} of the memory's bandwidth, keys and values "
        f"at {ACHIEVABLE.decoding_attention:.0%})"
    )
    return f"{title}\n{_table(rows, left=(0, 3))}"


def _storage(plan: Plan) -> str:
    host, disk, servers = plan.host, plan.disk, plan.generation.servers
    parts = [("processes", host.processes), ("checkpoint copy", host.checkpoint), ("offloaded optimizer", host.offloaded)]
    parts += [("answers", host.answers), ("embedded engine", host.engine)]
    memory = f"{_bytes(host.trainer_node)} on a node that trains ("
    memory += ", ".join(f"{name} {_bytes(size)}" for name, size in parts if size) + ")"
    memory += f"; {_bytes(host.rollout_node)} on one that generates" if host.rollout_node else ""
    kept = f"checkpoints {_bytes(disk.checkpoints)}" + (f", weights {_bytes(disk.weights)}" if disk.weights else "")
    rows = [
        ("host memory", memory),
        ("a save", f"each rank copies {_bytes(host.copy)} to host memory, and writes that"),
        ("disk", f"{_bytes(disk.whole_run)} after the whole run, of it at most {kept}"),
        (
            "",
            f"+ {_bytes(disk.per_100_steps)} per 100 steps: ledgers {_bytes(100 * disk.ledger)}, "
            f"exports of {_bytes(disk.export)}",
        ),
    ]
    if servers.overlaps:
        text = f"{servers.outstanding:,} outstanding tokens, room for the keys and values of {servers.kv_tokens:,}"
        rows.append(("each server", text))
    return "Storage, estimated\n" + _pairs(rows)


def _bytes(size: float) -> str:
    """
    >>> _bytes(3.1e12), _bytes(65.5e9), _bytes(2e6)
    ('3.10 TB', '66 GB', '2 MB')
    """
    return f"{size / 1e12:,.2f} TB" if size >= 1e12 else f"{size / 1e9:,.0f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def layouts_table(found: Search, limit: int = 12) -> str:
    """The layouts that fit, each tensor × pipeline × context in its fastest form, and why others were refused."""
    fastest: dict[tuple[int, int, int], TrainPlan] = {}
    for plan in found.fitting:
        fastest.setdefault((plan.layout.tensor, plan.layout.pipeline, plan.layout.context), plan)
    rows = [["tensor", "pipeline", "virtual", "context", "data", "expert", "recompute", "micro-batches", "peak GB", "train s"]]
    for plan in list(fastest.values())[:limit]:
        cut = plan.layout
        sizes = [cut.tensor, cut.pipeline, cut.virtual_pipeline, cut.context, cut.data, cut.expert, cut.recompute]
        seconds = f"{plan.time.total:,.0f}"
        rows.append([*map(str, sizes), str(plan.packs.num_micro_batches), f"{plan.peak / 1e9:.1f}", seconds])
    lines = [
        f"Layouts that fit, fastest first ({len(rows) - 1} of {len(fastest)}, each in its fastest form; estimates)",
        _table(rows),
    ]
    if found.refused:
        lines += ["", "Refused"]
        lines += [f"  {number:4}  {reason}" for reason, number in found.refused.items()]
    return "\n".join(lines)


def as_json(plan: Plan, found: Search | None) -> str:
    """The plan, and the layouts that fit if searched; bytes and seconds."""
    tree: dict[str, Any] = asdict(plan)
    tree["work"].pop("answer_lengths")
    tree |= {"peak": plan.training.peak, "fits": plan.training.fits, "step_seconds": plan.step_seconds}
    for stage, memory in zip(tree["training"]["stages"], plan.training.stages, strict=True):
        stage["peak"] = memory.peak
    if found is not None:
        tree["layouts"] = [
            asdict(each.layout) | {"peak": each.peak, "train_seconds": each.time.total} for each in found.fitting
        ]
        tree["refused"] = found.refused
    return json.dumps(tree, indent=2)


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"  {name:{width}}  {text}" for name, text in pairs)


def _table(rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """Columns as wide as their widest entry, right-aligned except for those in ``left``."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            f"{cell:{'<' if index in left else '>'}{width}}"
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(f"  {line}".rstrip() for line in lines)
