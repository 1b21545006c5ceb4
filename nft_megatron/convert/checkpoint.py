"""A checkpoint as converters see it: tensors by Hugging Face name, and problems with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from nft_megatron.base.errors import UserError
from nft_megatron.convert.blocks import StoredTensor
from nft_megatron.convert.engine import Files
from nft_megatron.weights.copies import UNTIE, Pair
from nft_megatron.weights.table import WeightTable, is_buffer


@dataclass(frozen=True)
class Problem:
    """One finding. ``kind`` is missing, unexpected, shape, dtype, bits, non-finite, damaged, config or log-probs; ``remedy`` is
    empty where it is the usual one.
    """

    kind: str
    name: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.name} {self.text}"


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint of any format. ``tensors`` are in the table's order; ``problems`` are those found without reading
    data, except that stored copies are compared.

    ``notes`` tell the user what is read in a way worth knowing.
    """

    path: Path
    format: str
    tensors: Mapping[str, StoredTensor]
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> dict[Path, int]:
        """The files that hold tensors, and their sizes."""
        names = {block.file for tensor in self.tensors.values() for block in tensor.blocks}
        return {file: file.stat().st_size for file in sorted(names)}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def refuse_problems(self, field: str) -> None:
        """Raise :class:`UserError` with the first problem, if there is one."""
        if self.problems:
            first, others = self.problems[0], len(self.problems) - 1
            text = f"{first.name} {first.text}" + (f" (and {others} more)" if others else "")
            usual = "check that its config.json matches these weights, or copy the checkpoint again"
            raise UserError(field, self.path, text, first.remedy or usual)


def compare_with_table(
    found: Mapping[str, StoredTensor], table: WeightTable, where: Path
) -> tuple[dict[str, StoredTensor], list[Problem]]:
    """The tensors of ``table`` in its order, and what is missing, unexpected, or of a different shape or kind of number."""
    problems = [Problem("missing", name, f"is not in {where}") for name in table.shapes if name not in found]
    problems += [
        Problem("unexpected", name, f"is in {place(found[name])} but not in the model that config.json describes")
        for name in found
        if name not in table.shapes and name not in table.copies and not is_buffer(name)
    ]
    tensors = {}
    for name, shape in table.shapes.items():
        if name in found:
            tensors[name] = found[name]
            if found[name].shape != shape:
                text = f"has shape {list(found[name].shape)} in {place(found[name])}, but config.json implies {list(shape)}"
                problems.append(Problem("shape", name, text))
            if not found[name].dtype.is_floating_point:
                problems.append(Problem("dtype", name, f"is {found[name].dtype} in {place(found[name])}, not floating-point"))
    return tensors, problems


def compare_copies(
    copies: Mapping[str, tuple[StoredTensor, str]], tensors: Mapping[str, StoredTensor], field: str
) -> tuple[list[Problem], list[str]]:
    """Problems with stored copies, each given with the name of the tensor that is read instead, and notes on the good ones."""
    problems, notes = [], []
    with Files(field) as files:
        for name, (copy, original) in copies.items():
            if original not in tensors:
                continue  # missing, which is reported
            pair = Pair(name, original, copy.shape, tensors[original].shape)
            difference = pair.difference(*(partial(_rows, files, tensor) for tensor in (copy, tensors[original])))
            if difference is None:
                notes.append(pair.note)
            else:
                problems.append(Problem("bits", name, difference, UNTIE))
    return problems, notes


def _rows(files: Files, tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
    band = np.empty((stop - start, tensor.row_bytes), np.uint8)
    files.read_rows(tensor, start, band)
    return torch.from_numpy(band.reshape(-1)).view(tensor.dtype).view(stop - start, *tensor.shape[1:])


def place(tensor: StoredTensor, row: int = 0) -> Path:
    """The file that holds a row of a tensor."""
    return next((block.file for block in tensor.blocks if block.row <= row < block.row + block.num_rows), Path("no file"))


def majority_dtype(tensors: Iterable[StoredTensor]) -> str:
    """The dtype of most bytes, as ``config.json`` names it."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        name = str(tensor.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + tensor.num_bytes
    return max(sizes, key=lambda name: sizes[name])
