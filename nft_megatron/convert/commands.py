"""``nft-megatron convert``: to-megatron, to-hf, check."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from nft_megatron.base.errors import UserError
from nft_megatron.base.paths import expand
from nft_megatron.convert.bridge_config import RUN_CONFIG, run_config
from nft_megatron.convert.checkpoint import Checkpoint, Problem, majority_dtype
from nft_megatron.convert.compare import compare, compare_shapes
from nft_megatron.convert.foreign import refuse_folder
from nft_megatron.convert.huggingface import open_huggingface, plan_huggingface
from nft_megatron.convert.journal import partial_path
from nft_megatron.convert.locate import ModelFiles, is_huggingface, model_files, resolve, without_model
from nft_megatron.convert.manifest import read_manifest
from nft_megatron.convert.mp_rank import is_mp_rank, open_mp_rank
from nft_megatron.convert.plan import Target
from nft_megatron.convert.progress import Meter
from nft_megatron.convert.torch_dist import open_torch_dist, places
from nft_megatron.convert.torch_dist_plan import plan_torch_dist
from nft_megatron.convert.transfer import transfer, unlike_the_rest
from nft_megatron.weights import read_shape, weight_table
from nft_megatron.weights.hf_reader import INDEX, SINGLE
from nft_megatron.weights.hf_writer import MAX_SHARD_BYTES
from nft_megatron.weights.table import WeightTable
from nft_megatron.weights.torch_dist_index import METADATA

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _num_threads(workers: int | None) -> int:
    """``workers`` if given; otherwise one per core that this process may use, at most 8: a disk is seldom faster."""
    if workers is not None and workers < 1:
        raise UserError("--workers", workers, "must be at least 1", "give 1 or more, or omit it")
    return workers or min(8, len(os.sched_getaffinity(0)))


def to_megatron(
    source: Path,
    destination: Path,
    *,
    dtype: str | None = None,
    workers: int | None = None,
    dry_run: bool = False,
    strict: bool = False,
    proof: bool = True,
) -> None:
    """Write the Hugging Face folder ``source`` as a ``torch_dist`` checkpoint that Megatron-Core loads under any layout.

    Megatron-Bridge takes it too, by its ``run_config.yaml``. ``strict`` refuses NaN and infinity. Without ``proof`` tensors are
    neither hashed nor checked, and the manifest says so.

    Raises:
        UserError: naming SRC, DST or the tensor that is wrong.
        OSError: if something cannot be written; finished work is kept, and the same call resumes.
    """
    if not is_huggingface(source):
        refuse_folder(source, "SRC")
    shape = read_shape(source, "SRC")
    table = weight_table(shape)
    checkpoint = open_huggingface(source, table, "SRC")
    checkpoint.refuse_problems("SRC")
    target = plan_torch_dist(partial_path(destination), table, _dtypes(checkpoint, dtype))
    of_bridge = run_config(shape, majority_dtype(target.tensors.values()))
    if of_bridge is None:
        print(f"{RUN_CONFIG} for Megatron-Bridge is left out: Megatron-Core cannot express this model's scaling of positions")
    else:
        target = replace(target, small={**target.small, RUN_CONFIG: of_bridge})
    _convert(checkpoint, target, table, destination, ModelFiles(source, source), workers, dry_run, strict, proof)


def to_hf(
    source: Path,
    destination: Path,
    *,
    model: Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    workers: int | None = None,
    dry_run: bool = False,
    strict: bool = False,
    proof: bool = True,
) -> None:
    """Write the weights of a Megatron checkpoint, saved under any layout, as a Hugging Face folder.

    ``model`` is the folder with ``config.json`` and tokenizer; by default ``source`` itself, or the model that the run of
    ``source`` started from. ``strict`` and ``proof`` are as in :func:`to_megatron`.

    Raises:
        UserError: naming SRC, DST, ``--model`` or the tensor that is wrong.
        OSError: if something cannot be written; finished work is kept, and the same call resumes.
    """
    source = resolve(source, "SRC")
    found = model_files(source, "SRC", model)
    if found is None:
        raise without_model(source, "SRC")
    table = weight_table(read_shape(found.config, "--model"))
    checkpoint = open_checkpoint(source, table, "SRC")
    checkpoint.refuse_problems("SRC")
    target = plan_huggingface(partial_path(destination), table.shapes, _dtypes(checkpoint, dtype), max_shard_bytes)
    if found.note:
        print(found.note)
    _convert(checkpoint, target, table, destination, found, workers, dry_run, strict, proof)


def convert_checkpoint(source: Path | str, destination: Path | str, *, model: Path | str | None = None) -> None:
    """Convert in the direction that ``source`` implies: a Hugging Face folder to Megatron-Core, any other checkpoint back.

    ``model`` is the Hugging Face folder that a Megatron checkpoint without ``config.json`` belongs to.

    Raises:
        UserError, OSError: as :func:`to_megatron` and :func:`to_hf` do.
    """
    source, destination = expand(source), expand(destination)
    if is_huggingface(source):
        to_megatron(source, destination)
    else:
        to_hf(source, destination, model=None if model is None else expand(model))


def check(a: Path, b: Path, *, model: Path | None = None, prompt: str | None = None, workers: int | None = None) -> None:
    """Compare two checkpoints of any format, bit by bit, and print every difference.

    ``model`` is a folder with ``config.json``, for two checkpoints that have none. With ``prompt``, the log-probs of its tokens
    under both are also compared, in float32 by transformers; a Megatron checkpoint is converted for that.

    Raises:
        UserError: if there is any difference, or anything wrong with either.
    """
    paths = resolve(a, "A"), resolve(b, "B")
    found = [model_files(path, label) for path, label in zip(paths, "AB", strict=True)]
    folders = [None if files is None else files.config for files in found]
    described = model or folders[0] or folders[1]
    label = "config.json" if model is None else "--model"
    table = weight_table(read_shape(described, label)) if described is not None else None
    first, second = (open_checkpoint(path, table, label) for path, label in zip(paths, "AB", strict=True))
    problems: list[Problem] = []
    if folders[0] is not None and folders[1] is not None:
        problems += compare_shapes(*(read_shape(folder, label) for folder, label in zip(folders, "AB", strict=True) if folder))
    console = Console(stderr=True)
    with Meter("check", first.num_bytes + second.num_bytes, console) as meter:
        problems += compare(first, second, _num_threads(workers), meter.advance)
    if prompt is not None:
        from nft_megatron.convert.logprobs import compare_log_probs

        problems += compare_log_probs(*paths, prompt, lambda path, folder: to_hf(path, folder, model=described))
    for path, label in zip(paths, "AB", strict=True):
        if (manifest := read_manifest(path, label)) is not None and manifest.fingerprint is None:
            print(f"{label} was converted without proof: its tensors have no recorded hashes")
    for checkpoint in (first, second):
        for note in checkpoint.notes:
            print(f"{checkpoint.path}: {note}")
    for problem in problems:
        print(problem)
    if problems:
        text = f"{len(problems)} problem{'s' * (len(problems) > 1)} compared with {b}, first: {problems[0]}"
        raise UserError("check", a, text, problems[0].remedy or "convert or copy the damaged side again")
    print(f"{len(first.tensors)} tensors, {first.num_bytes:,} bytes: {first.format} {a} and {second.format} {b} are identical")


def open_checkpoint(path: Path, table: WeightTable | None, field: str) -> Checkpoint:
    """Open a checkpoint of whichever format it is.

    Raises:
        UserError: naming ``field`` if it is of no known format or unreadable.
    """
    if is_huggingface(path):
        return open_huggingface(path, table, field)
    if table is None:
        raise without_model(path, field)
    if (path / METADATA).is_file():
        return open_torch_dist(path, table, field)
    if is_mp_rank(path):
        return open_mp_rank(path, table, field)
    raise UserError(
        field,
        path,
        f"is not a checkpoint: it has neither {SINGLE}, {INDEX}, {METADATA} nor folders mp_rank_XX",
        "check the path",
    )


def _dtypes(checkpoint: Checkpoint, dtype: str | None) -> dict[str, torch.dtype]:
    """The dtype of each tensor to write. Only floating-point tensors are cast."""
    return {
        name: DTYPES[dtype] if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype
        for name, tensor in checkpoint.tensors.items()
    }


def _convert(
    checkpoint: Checkpoint,
    target: Target,
    table: WeightTable,
    destination: Path,
    model: ModelFiles,
    workers: int | None,
    dry_run: bool,
    strict: bool,
    proof: bool,
) -> None:
    if strict and not proof:
        raise UserError("--no-proof", "with --strict", "cannot find NaN and infinity", "omit one of the two")
    for note in checkpoint.notes:
        print(note)
    if odd := unlike_the_rest(target.tensors):
        print(f"of a different dtype than the rest, kept unchanged: {', '.join(odd)}")
    if dry_run:
        _print_plan(checkpoint, target, table, destination)
        return
    with Meter("convert", target.num_bytes, Console(stderr=True)) as meter:
        threads = _num_threads(workers)
        manifest = transfer(checkpoint, target, destination, model, threads, meter.advance, strict=strict, proof=proof)
    for name, record in manifest.tensors.items():
        if record.non_finite is not None:
            print(f"warning: {name} is not finite at {record.non_finite}; copied unchanged (--strict refuses it)")
    proven = f"fingerprint {manifest.fingerprint}" if proof else "unproven: neither hashed nor searched for NaN and infinity"
    print(f"{destination}: {len(manifest.tensors)} tensors, {target.num_bytes:,} bytes, {proven}")


def _print_plan(checkpoint: Checkpoint, target: Target, table: WeightTable, destination: Path) -> None:
    """Print the mapping table, one line per tensor."""
    by_name = places(table)
    for entry in table.entries:
        for name in entry.sources if entry.exported else ():
            source, planned = checkpoint.tensors[name], target.tensors[name]
            dtype = str(source.dtype).removeprefix("torch.")
            cast = "" if source.dtype == planned.dtype else f" as {str(planned.dtype).removeprefix('torch.')}"
            key, index = by_name[entry.name].key, by_name[entry.name].index
            part = f", {entry.layout.value} part {entry.sources.index(name) + 1} of {len(entry.sources)}"
            where = f"{key}{list(index) if index else ''}{part if len(entry.sources) > 1 else ''}"
            print(f"{name}  {json.dumps(list(source.shape))} {dtype}{cast}  {where}")
    sizes = ", ".join(f"{file.name} {size:,}" for file, size in target.files.items())
    print(f"{destination}: {len(target.tensors)} tensors, {target.num_bytes:,} bytes in {sizes}; nothing is written")
