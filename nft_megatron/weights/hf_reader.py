"""Locates and slices the tensors of a Hugging Face model folder: one ``model.safetensors``, or shards with an index.

The safetensors library reads headers; the bytes of tensors are read with plain positioned reads. They are not memory-mapped,
because on network disks every page is a separate request, which is very slow.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open

from nft_megatron.base.errors import UserError
from nft_megatron.base.paths import check_model_folder
from nft_megatron.base.untrusted import is_plain_name, read_json_object
from nft_megatron.weights.copies import UNTIE, Pair
from nft_megatron.weights.table import WeightTable, is_buffer, note_on_buffers

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes named in safetensors headers."""

_COPY_AGAIN = "copy or download the model folder again"
_BAND_BYTES = 1 << 23


@dataclass(frozen=True)
class TensorPlace:
    """A tensor stored row-major in ``file`` from byte ``offset``."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class HFReader:
    """An open model folder, as a context manager. Each file is opened when its first tensor is read.

    Raises:
        UserError: naming ``field`` and the folder or file that is missing, truncated or unreadable.
    """

    def __init__(self, folder: Path, field: str = "model.path") -> None:
        self._field, self._folder = field, folder
        self._descriptors: dict[Path, int] = {}
        check_model_folder(folder, field)
        self.places: Mapping[str, TensorPlace] = self._find_tensors()

    def __enter__(self) -> HFReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    @property
    def names(self) -> frozenset[str]:
        """Every tensor of the folder."""
        return frozenset(self.places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The full shape of a tensor."""
        return self.places[name].shape

    def read(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """Rows ``start:stop`` along ``axis``, in the file's dtype.

        Along the first axis only the needed bytes are read; along another, the whole tensor, a band of rows at a time.
        """
        place = self.places[name]
        shape = list(place.shape)
        row_bytes = math.prod(shape[1:]) * place.dtype.itemsize
        if axis == 0:
            return self._rows(place, start, stop, row_bytes)
        num_rows, band = shape[0], max(1, _BAND_BYTES // row_bytes)
        shape[axis] = stop - start
        result = torch.empty(shape, dtype=place.dtype)
        for row in range(0, num_rows, band):
            rows = self._rows(place, row, min(row + band, num_rows), row_bytes)
            result[row : row + band].copy_(rows.narrow(axis, start, stop - start))
        return result

    def check(self, table: WeightTable) -> tuple[str, ...]:
        """Notes for the user on stored tensors that are not read: copies of others, constants.

        Raises :class:`UserError` unless the folder holds exactly the table's other tensors, floating-point, in its shapes, or
        if one of the copies differs.
        """
        expected = table.shapes
        unexpected = {name for name in self.names - expected.keys() - table.copies.keys() if not is_buffer(name)}
        for problem, names in (
            ("lacks the tensor", expected.keys() - self.names),
            ("holds an unexpected tensor", unexpected),
        ):
            if names:
                first, others = min(names), len(names) - 1
                text = f"{problem} {first}" + (f" and {others} more" if others else "")
                raise UserError(self._field, self._folder, text, f"check config.json against the weights, or {_COPY_AGAIN}")
        for name, shape in expected.items():
            if self.shape(name) != shape:
                raise UserError(
                    self._field,
                    self._folder,
                    f"{name} has shape {list(self.shape(name))}, but config.json implies {list(shape)}",
                    "check config.json against the weights",
                )
            if not self.places[name].dtype.is_floating_point:
                problem = f"{name} holds {str(self.places[name].dtype).removeprefix('torch.')}, not floating-point numbers"
                raise UserError(self._field, self._folder, problem, _COPY_AGAIN)
        return (*self._compare_copies(table), *note_on_buffers(self.names - expected.keys()))

    def _compare_copies(self, table: WeightTable) -> Iterator[str]:
        for name in table.copies.keys() & self.names:
            pair = Pair(name, table.copies[name], self.shape(name), self.shape(table.copies[name]))
            difference = pair.difference(partial(self.read, name, 0), partial(self.read, pair.original, 0))
            if difference is not None:
                raise UserError(self._field, self._folder, f"{name} {difference}", UNTIE)
            yield pair.note

    def _rows(self, place: TensorPlace, start: int, stop: int, row_bytes: int) -> torch.Tensor:
        if place.file not in self._descriptors:
            self._descriptors[place.file] = os.open(place.file, os.O_RDONLY)
        buffer = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        view, offset = buffer.numpy().data, place.offset + start * row_bytes
        while view:
            count = os.preadv(self._descriptors[place.file], [view], offset)
            if not count:
                raise UserError(self._field, place.file, "became shorter while it was read", _COPY_AGAIN)
            view, offset = view[count:], offset + count
        return buffer.view(place.dtype).view(stop - start, *place.shape[1:])

    def _find_tensors(self) -> dict[str, TensorPlace]:
        if (self._folder / SINGLE).is_file():
            return self._read_header(self._folder / SINGLE)
        path = self._folder / INDEX
        if not path.is_file():
            raise UserError(
                self._field,
                self._folder,
                f"has no weights: neither {SINGLE} nor {INDEX}",
                "give a folder with safetensors weights",
            )
        file_of = read_json_object(path, self._field, _COPY_AGAIN).get("weight_map")
        if not isinstance(file_of, dict) or not all(is_plain_name(name) for name in file_of.values()):
            problem = "is not an index of weights: its weight_map must give each tensor the name of a file of this folder"
            raise UserError(self._field, path, problem, _COPY_AGAIN)
        places: dict[str, TensorPlace] = {}
        for name in sorted(set(file_of.values())):
            if not (self._folder / name).is_file():
                raise UserError(self._field, path, f"names {name}, which is not there", _COPY_AGAIN)
            places |= self._read_header(self._folder / name)
        for name, file in file_of.items():
            if name not in places or places[name].file.name != file:
                raise UserError(self._field, self._folder / file, f"lacks {name}, which {INDEX} places there", _COPY_AGAIN)
        return places

    def _read_header(self, path: Path) -> dict[str, TensorPlace]:
        """The tensors of one file, as the safetensors library reads its header.

        It refuses gaps and overlaps, so tensors follow one another from the end of the header, in the order of their offsets.
        """
        places = {}
        try:
            with path.open("rb") as file:
                offset = 8 + int.from_bytes(file.read(8), "little")
            with safe_open(path, framework="numpy") as header:
                for name in header.offset_keys():
                    tensor = header.get_slice(name)
                    if tensor.get_dtype() not in DTYPES:
                        raise ValueError(f"{name} has an unknown dtype, {tensor.get_dtype()}")
                    places[name] = TensorPlace(path, offset, DTYPES[tensor.get_dtype()], tuple(tensor.get_shape()))
                    offset += math.prod(places[name].shape) * places[name].dtype.itemsize
        except (SafetensorError, ValueError) as error:
            raise UserError(self._field, path, f"is not a complete safetensors file ({error})", _COPY_AGAIN) from error
        assert offset == path.stat().st_size, path
        return places


def refuse_non_finite(field: str, folder: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself, if all of its numbers are finite.

    Raises:
        UserError: naming ``field``, the folder and the tensor if one is infinite or NaN.
    """
    numbers = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    if tensor.numel() and not all(bool(extreme.isfinite()) for extreme in numbers.aminmax()):
        problem = f"{name} holds numbers that are not finite in {str(tensor.dtype).removeprefix('torch.')}"
        raise UserError(field, folder, problem, "copy the model folder again, or find the step that broke it")
    return tensor
