"""Compares two checkpoints of any format, tensor by tensor and bit by bit, and each with its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import groupby

import numpy as np
import torch

from nft_megatron.base.errors import UserError
from nft_megatron.convert.blocks import StoredTensor
from nft_megatron.convert.checkpoint import Checkpoint, Problem, place
from nft_megatron.convert.engine import (
    Bytes,
    Files,
    bands,
    cast_band,
    element,
    first_non_finite,
    read_band,
    run_all,
    thread_buffer,
)
from nft_megatron.convert.manifest import NAME, Manifest, gaps, read_manifest
from nft_megatron.weights.fingerprint import begin_digest
from nft_megatron.weights.shape import ModelShape

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Side:
    """One of the two checkpoints, with its name on the command line."""

    label: str
    checkpoint: Checkpoint
    manifest: Manifest | None


def compare(a: Checkpoint, b: Checkpoint, workers: int, advance: Advance) -> list[Problem]:
    """Every difference between the two, and every problem with either.

    If B records that a tensor was cast on request from A's dtype, A's numbers are cast before they are compared.
    """
    sides = Side("A", a, read_manifest(a.path, "A")), Side("B", b, read_manifest(b.path, "B"))
    problems = [
        replace(problem, text=f"{problem.text} ({side.label})") for side in sides for problem in side.checkpoint.problems
    ]
    for side, other in (sides, sides[::-1]):
        problems += [
            Problem("missing", name, f"is in {side.label} ({place(tensor)}) but not in {other.label}")
            for name, tensor in side.checkpoint.tensors.items()
            if name not in other.checkpoint.tensors and not any(problem.name == name for problem in problems)
        ]
        problems += _compare_with_manifest(side)
    with Files("checkpoint") as files:
        work: list[Callable[[], list[Problem]]]
        work = [partial(_check_around_tensors, side, files) for side in sides if side.manifest is not None]
        work += list(_pairs(*sides, files, advance))
        return problems + [problem for found in run_all(work, workers, files.stop) for problem in found]


def compare_shapes(a: ModelShape, b: ModelShape) -> list[Problem]:
    """Differences between the models of the two ``config.json``."""
    return [
        Problem("config", field.name, f"is {getattr(a, field.name)} in A, {getattr(b, field.name)} in B")
        for field in fields(ModelShape)
        if getattr(a, field.name) != getattr(b, field.name)
    ]


def _compare_with_manifest(side: Side) -> list[Problem]:
    """Compare names, shapes and dtypes with the manifest."""
    if side.manifest is None:
        return []
    problems = []
    tensors, recorded = side.checkpoint.tensors, side.manifest.tensors
    for name in recorded.keys() - tensors.keys():
        problems.append(Problem("missing", name, f"is recorded in {NAME} of {side.label} but missing"))
    for name in tensors.keys() - recorded.keys():
        problems.append(
            Problem("unexpected", name, f"is in {place(tensors[name])} ({side.label}) but not recorded in its {NAME}")
        )
    for name in tensors.keys() & recorded.keys():
        found, record = tensors[name], recorded[name]
        if found.shape != record.shape or str(found.dtype) != f"torch.{record.dtype}":
            text = f"is {found.dtype} {list(found.shape)} in {side.label}, recorded as {record.dtype} {list(record.shape)}"
            problems.append(Problem("shape" if found.shape != record.shape else "dtype", name, text))
    return problems


def _check_around_tensors(side: Side, files: Files) -> list[Problem]:
    """Compare headers, metadata, configuration and tokenizer: all bytes that belong to no tensor."""
    assert side.manifest is not None
    folder = side.checkpoint.path
    present = {path: path.stat().st_size for path in folder.iterdir() if path.is_file() and path.name != NAME}
    of_tensors = gaps(side.checkpoint.tensors.values(), side.checkpoint.files)
    problems = []
    for name, recorded in side.manifest.files.items():
        path = folder / name
        if path not in present:
            problems.append(Problem("missing", name, f"is recorded in {NAME} of {side.label} but missing"))
            continue
        digest = hashlib.sha256()
        for start, stop in of_tensors.get(path, [(0, present[path])]):
            for position in range(start, stop, 1 << 20):
                part = thread_buffer(0, min(1 << 20, stop - position))
                files.read(path, position, part)
                digest.update(part.data)
        if digest.hexdigest() != recorded:
            problems.append(Problem("damaged", name, f"of {side.label} differs from {NAME} outside its tensors"))
    return problems


def _pairs(a: Side, b: Side, files: Files, advance: Advance) -> Iterator[Callable[[], list[Problem]]]:
    """One task per group of tensors that are stored together in A."""
    both = [name for name in a.checkpoint.tensors if name in b.checkpoint.tensors]
    for _, names in groupby(both, key=lambda name: a.checkpoint.tensors[name].checksums or name):
        yield partial(_compare_all, list(names), a, b, files, advance)


def _compare_all(names: list[str], a: Side, b: Side, files: Files, advance: Advance) -> list[Problem]:
    problems = []
    for side in (a, b):
        checksums = dict.fromkeys(checksum for name in names for checksum in side.checkpoint.tensors[name].checksums)
        for checksum in checksums:
            try:
                files.verify(checksum, " and ".join(names))
            except UserError as error:
                problems.append(Problem("damaged", names[0], f"({side.label}) in {checksum.file}: {error.problem}"))
    for name in names:
        problems += _compare_tensor(name, a, b, files)
        advance(a.checkpoint.tensors[name].num_bytes + b.checkpoint.tensors[name].num_bytes)
    return problems


def _compare_tensor(name: str, a: Side, b: Side, files: Files) -> list[Problem]:
    tensors = a.checkpoint.tensors[name], b.checkpoint.tensors[name]
    first, second = tensors
    if first.shape != second.shape:
        return [Problem("shape", name, f"is {list(first.shape)} in A and {list(second.shape)} in B")]
    scans = [_Scan(name, side, tensor) for side, tensor in zip((a, b), tensors, strict=True)]
    comparable, problems = _comparable(name, first, second, b.manifest)
    num_different, where = 0, None
    for row, num_rows in bands(first, max(first.row_bytes, second.row_bytes)):
        pair = [read_band(files, tensor, row, num_rows, number) for number, tensor in enumerate(tensors)]
        for scan, band in zip(scans, pair, strict=True):
            scan.take(row, band)
        if comparable:
            pair[0] = cast_band(pair[0], first.dtype, second.dtype)
            if not np.array_equal(pair[0], pair[1]):
                different = (pair[0] != pair[1]).reshape(-1, second.dtype.itemsize).any(axis=1)
                if where is None:
                    number = int(np.argmax(different))
                    values = [_value(band, second.dtype, number) for band in pair]
                    where = f"first at {element(second, row, number)}: {values[0]} in A, {values[1]} in B"
                num_different += int(different.sum())
    if where is not None:
        total = second.num_bytes // second.dtype.itemsize
        problems.append(Problem("bits", name, f"differs in {num_different} of {total} elements, {where} ({place(second)})"))
    return problems + [problem for scan in scans for problem in scan.problems()]


def _comparable(name: str, first: StoredTensor, second: StoredTensor, manifest: Manifest | None) -> tuple[bool, list[Problem]]:
    if first.dtype == second.dtype:
        return True, []
    record = manifest.tensors.get(name) if manifest is not None else None
    if record is not None and f"torch.{record.cast_from}" == str(first.dtype):
        return True, []
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in (first, second)]
    return False, [Problem("dtype", name, f"is {dtypes[0]} in A and {dtypes[1]} in B ({place(second)})")]


def _value(band: Bytes, dtype: torch.dtype, number: int) -> float:
    start = number * dtype.itemsize
    return float(torch.from_numpy(band.reshape(-1)[start : start + dtype.itemsize].copy()).view(dtype).item())


class _Scan:
    """Checks one side's tensor as it streams by: its hash, and values that are not finite."""

    def __init__(self, name: str, side: Side, tensor: StoredTensor) -> None:
        self._name, self._side, self._tensor = name, side, tensor
        record = side.manifest.tensors.get(name) if side.manifest is not None else None
        self._sha256 = record.sha256 if record is not None else None
        self._digest = begin_digest(name, tensor.dtype, tensor.shape)
        self._non_finite: str | None = None

    def take(self, row: int, band: Bytes) -> None:
        if self._sha256 is not None:
            self._digest.update(band.data)
        if self._non_finite is None:
            bad = first_non_finite(band, self._tensor.dtype)
            if bad is not None:
                file = place(self._tensor, row + bad * self._tensor.dtype.itemsize // self._tensor.row_bytes)
                self._non_finite = f"at {element(self._tensor, row, bad)} of {file} ({self._side.label})"

    def problems(self) -> Iterator[Problem]:
        if self._non_finite is not None:
            yield Problem("non-finite", self._name, self._non_finite)
        if self._sha256 not in (None, self._digest.hexdigest()):
            text = f"in {place(self._tensor)} ({self._side.label}) does not match its hash in {NAME}"
            yield Problem("damaged", self._name, text)
