"""One conversion: from an open checkpoint to a planned folder, with every proof along the way."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.errors import UserError
from nft_megatron.base.version import __version__
from nft_megatron.convert.blocks import StoredTensor
from nft_megatron.convert.checkpoint import Checkpoint, majority_dtype, place
from nft_megatron.convert.engine import Bytes, Files, bands, cast_band, element, first_non_finite, read_band, run_all
from nft_megatron.convert.journal import PartialFolder
from nft_megatron.convert.locate import ModelFiles
from nft_megatron.convert.manifest import NAME, Manifest, TensorRecord, read_manifest, sha256
from nft_megatron.convert.plan import Target
from nft_megatron.weights.fingerprint import begin_digest
from nft_megatron.weights.hf_writer import copy_model_files, state_dtype

Advance = Callable[[int], None]


def transfer(
    source: Checkpoint,
    target: Target,
    final: Path,
    model: ModelFiles,
    workers: int,
    advance: Advance,
    *,
    strict: bool = False,
    proof: bool = True,
) -> Manifest:
    """Write ``target``, which is planned for ``partial_path(final)``, and rename it to ``final``.

    ``model`` provides configuration and tokenizer. A tensor whose dtype differs between target and source is cast. After
    an interruption, the same call resumes. A value that is not finite is copied and recorded in the manifest; ``strict``
    refuses it. Without ``proof`` no byte of a tensor is checked: no hash, no search for NaN, no comparison with recorded hashes
    and stored checksums. Nothing then shows what has reached the disk, so an interrupted conversion of this kind starts over.

    Raises:
        UserError: for a source that is damaged or changes while read; a target that exists; under ``strict``, NaN and infinity.
        OSError: if something cannot be written.
    """
    before = _fingerprint(source, model.config)
    known = read_manifest(source.path, "SRC") if proof else None
    expected = {name: record.sha256 for name, record in known.tensors.items() if record.sha256} if known is not None else {}
    identity = {
        "tool": __version__,
        "source": before,
        "files": {file.name: size for file, size in target.files.items()},
        "dtypes": {name: str(tensor.dtype) for name, tensor in target.tensors.items()},
        "proof": proof,
    }
    with PartialFolder(final, identity, target.num_bytes) as folder, Files("SRC") as files:
        for file, size in target.files.items():
            os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o644))
            os.ftruncate(files.descriptor(file, os.O_RDWR), size)
        job = _Job(files, source, target, folder, expected, advance, strict, proof)
        records = dict(pair for pairs in run_all(job.units(), workers, files.stop) for pair in pairs)
        if _fingerprint(source, model.config) != before:
            raise UserError("SRC", source.path, "changed while it was read", "start again once it is complete")
        flush = [partial(os.fsync, files.descriptor(file, os.O_RDWR)) for file in target.files]
        run_all(flush, workers, files.stop)
        _write_around_tensors(target, files, model)
        manifest = Manifest(
            tensors={name: records[name] for name in target.tensors},
            files=_hashes_around_tensors(target),
            source={
                "path": str(source.path.resolve()),
                "format": source.format,
                "files": {file.name: size for file, size in source.files.items()},
            },
        )
        with atomic_file(folder.path / NAME) as temporary:
            temporary.write_text(manifest.to_json())
        folder.publish()
    return manifest


def _fingerprint(source: Checkpoint, model_folder: Path) -> dict[str, Any]:
    """What identifies a source without reading it."""
    paths = [*source.files, model_folder / "config.json"]
    return {str(path.resolve()): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def _write_around_tensors(target: Target, files: Files, model: ModelFiles) -> None:
    """Headers, metadata, configuration: without them the folder does not count as a checkpoint, so they come last."""
    for file, offset, data in target.parts:
        files.write(file, offset, memoryview(data))
    for name, content in target.small.items():
        (target.folder / name).write_bytes(content)
    copy_model_files(model.config, target.folder, model.tokenizer)
    state_dtype(target.folder / "config.json", majority_dtype(target.tensors.values()))


def _hashes_around_tensors(target: Target) -> dict[str, str]:
    parts: dict[str, list[tuple[int, bytes]]] = {file.name: [] for file in target.files}
    for file, offset, data in target.parts:
        parts[file.name].append((offset, data))
    hashes = {name: sha256(data for _, data in sorted(pieces)) for name, pieces in parts.items()}
    for path in sorted(target.folder.iterdir()):
        if path.name not in parts and path.suffix != ".jsonl":
            hashes[path.name] = sha256([path.read_bytes()])
    return hashes


@dataclass(frozen=True)
class _Job:
    files: Files
    source: Checkpoint
    target: Target
    folder: PartialFolder
    expected: Mapping[str, str]
    advance: Advance
    strict: bool
    proof: bool

    def units(self) -> list[Callable[[], list[tuple[str, TensorRecord]]]]:
        """One thread's tasks: tensors that are stored together, whose checksums are verified together.

        The largest come first, so that no thread is left alone with one at the end.
        """
        stored = self.source.tensors
        groups = [list(names) for _, names in groupby(self.target.tensors, key=lambda name: stored[name].checksums or name)]
        groups.sort(key=lambda names: -sum(stored[name].num_bytes for name in names))
        return [partial(self._copy_all, names) for names in groups]

    def _copy_all(self, names: list[str]) -> list[tuple[str, TensorRecord]]:
        records = {name: self._already_there(name) for name in names}
        if self.proof and not all(records.values()):
            for checksum in self.source.tensors[names[0]].checksums:
                self.files.verify(checksum, " and ".join(names))
        return [(name, records[name] or self._copy(name)) for name in names]

    def _record(self, name: str, sha256: str | None, non_finite: list[int] | None) -> TensorRecord:
        source, target = self.source.tensors[name], self.target.tensors[name]
        dtype, cast_from = (str(tensor.dtype).removeprefix("torch.") for tensor in (target, source))
        return TensorRecord(dtype, target.shape, sha256, None if dtype == cast_from else cast_from, non_finite)

    def _already_there(self, name: str) -> TensorRecord | None:
        """What an earlier process wrote, if it still matches its recorded hash."""
        if name not in self.folder.done or (self.strict and self.folder.done[name]["non_finite"]):
            return None
        tensor = self.target.tensors[name]
        digest = begin_digest(name, tensor.dtype, tensor.shape)
        for row, num_rows in bands(tensor, tensor.row_bytes):
            digest.update(read_band(self.files, tensor, row, num_rows, 0).data)
        if digest.hexdigest() != self.folder.done[name]["sha256"]:
            return None
        self.advance(tensor.num_bytes)
        return self._record(name, digest.hexdigest(), self.folder.done[name]["non_finite"])

    def _copy(self, name: str) -> TensorRecord:
        source, target = self.source.tensors[name], self.target.tensors[name]
        proof = _Proof(name, source, target, self.expected.get(name), self.strict) if self.proof else None
        for row, num_rows in bands(target, max(source.row_bytes, target.row_bytes)):
            band = read_band(self.files, source, row, num_rows, 0)
            written = cast_band(band, source.dtype, target.dtype)
            if proof is not None:
                proof.take(row, band, written)
            self.files.write_rows(target, row, written)
            self.advance(written.nbytes)
        if proof is None:
            return self._record(name, None, None)
        record = self._record(name, proof.sha256(), proof.non_finite)
        self.folder.record(name, {"sha256": record.sha256, "non_finite": record.non_finite})
        return record


class _Proof:
    """Checks a tensor as its bands stream by. ``expected``: its hash in the source's manifest."""

    def __init__(self, name: str, source: StoredTensor, target: StoredTensor, expected: str | None, strict: bool) -> None:
        self._name, self._source, self._target, self._expected, self._strict = name, source, target, expected, strict
        self._written = begin_digest(name, target.dtype, target.shape)
        self._read = begin_digest(name, source.dtype, source.shape) if source.dtype != target.dtype else self._written
        self.non_finite: list[int] | None = None

    def take(self, row: int, band: Bytes, written: Bytes) -> None:
        """Rows starting at ``row``, as read and as written."""
        if self._read is not self._written and self._expected is not None:
            self._read.update(band.data)
        self._written.update(written.data)
        bad = first_non_finite(written, self._target.dtype) if self.non_finite is None else None
        if bad is not None:
            self.non_finite = element(self._target, row, bad)
            if self._strict:
                file = place(self._source, row + bad * self._target.dtype.itemsize // self._target.row_bytes)
                text = f"{self._name} is not finite at {self.non_finite}"
                raise UserError("SRC", file, text, "use a checkpoint without NaN and infinity")

    def sha256(self) -> str:
        """The record of the tensor as written. Raises :class:`UserError` if the bytes read contradict the source's manifest."""
        if self._expected not in (None, self._read.hexdigest()):
            raise UserError(
                "SRC",
                place(self._source),
                f"is damaged: {self._name} does not match its hash in {NAME}",
                f"copy the checkpoint again; if weights were changed on purpose, delete {NAME}",
            )
        return self._written.hexdigest()


def unlike_the_rest(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """The tensors whose dtype differs from that of most: kept unchanged, but worth reporting."""
    usual = majority_dtype(tensors.values())
    return [name for name, tensor in tensors.items() if str(tensor.dtype) != f"torch.{usual}"]
