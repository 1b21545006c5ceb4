"""Reads slices of tensors from a Hugging Face model folder: one ``model.safetensors``, or shards with an index."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nft_megatron.errors import UserError
from nft_megatron.weights.table import WeightTable

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_COPY_AGAIN = "copy or download the model folder again"


class HFReader:
    """An open model folder. A context manager; files are opened when their first tensor is read.

    Raises:
        UserError: naming ``field`` and the folder or file that is missing or unreadable.
    """

    def __init__(self, folder: Path, field: str = "model.path") -> None:
        self._field, self._folder = field, folder
        self._files: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        if not folder.is_dir():
            raise UserError(field, folder, "no such folder", "give the path of a Hugging Face model folder")
        self._file_of = self._find_tensors()

    def __enter__(self) -> HFReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    @property
    def names(self) -> frozenset[str]:
        """Every tensor of the folder."""
        return frozenset(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """The full shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """Rows ``start:stop`` along ``axis``, in the file's dtype; only their bytes are read."""
        return self._slice(name)[(slice(None),) * axis + (slice(start, stop),)]

    def check(self, table: WeightTable) -> None:
        """Raise :class:`UserError` unless the folder holds exactly the table's tensors, in its shapes."""
        expected = table.shapes
        for problem, names in (
            ("lacks the tensor", expected.keys() - self.names),
            ("holds an unexpected tensor", self.names - expected.keys() - table.ignored),
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
                    f"{name} has shape {list(self.shape(name))} where config.json implies {list(shape)}",
                    "check config.json against the weights",
                )

    def _find_tensors(self) -> dict[str, str]:
        if (self._folder / _SINGLE).is_file():
            return dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)
        path = self._folder / _INDEX
        if not path.is_file():
            raise UserError(
                self._field,
                self._folder,
                f"has no weights: neither {_SINGLE} nor {_INDEX}",
                "give a folder with safetensors weights",
            )
        try:
            file_of = dict(json.loads(path.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(self._field, path, f"is not an index of weights ({error})", _COPY_AGAIN) from error
        for name in sorted(set(file_of.values())):
            if not (self._folder / name).is_file():
                raise UserError(self._field, path, f"names {name}, which is not there", _COPY_AGAIN)
        return file_of

    def _open(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = self._stack.enter_context(safe_open(self._folder / name, framework="pt"))
            except SafetensorError as error:
                raise UserError(
                    self._field, self._folder / name, f"is not a whole safetensors file ({error})", _COPY_AGAIN
                ) from error
        return self._files[name]

    def _slice(self, name: str) -> Any:
        path = self._file_of[name]
        try:
            return self._open(path).get_slice(name)
        except SafetensorError as error:
            raise UserError(
                self._field, self._folder / path, f"lacks {name}, which {_INDEX} places there", _COPY_AGAIN
            ) from error
