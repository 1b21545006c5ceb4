"""What a conversion wrote, so that anyone can later prove that nothing has changed: ``conversion.json``.

Every byte of the folder is covered by one hash. A tensor's is the SHA-256 of
:func:`nft_megatron.weights.fingerprint.tensor_digest`, over its Hugging Face name, dtype, shape and bytes in row-major order,
so it is the same in every format and layout; together they give the fingerprint that a run reports for the same weights. A
file's hash covers all of its bytes that belong to no tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nft_megatron.base.errors import UserError
from nft_megatron.base.untrusted import read_json_object
from nft_megatron.base.version import __version__
from nft_megatron.convert.blocks import StoredTensor
from nft_megatron.weights.fingerprint import combine_digests

NAME = "conversion.json"


@dataclass(frozen=True)
class TensorRecord:
    """``cast_from``: the source's dtype if it was cast on request. ``non_finite``: index of the first infinity or NaN.

    ``sha256`` is None for a tensor that was converted without proof: neither hashed nor searched for NaN and infinity.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str | None
    cast_from: str | None = None
    non_finite: list[int] | None = None


@dataclass(frozen=True)
class Manifest:
    """``files``: name → SHA-256 of what belongs to no tensor. ``source``: where the tensors came from."""

    tensors: Mapping[str, TensorRecord]
    files: Mapping[str, str]
    source: Mapping[str, Any]
    tool: str = f"nft_megatron {__version__}"

    @property
    def fingerprint(self) -> str | None:
        """One hash over all tensors; None if a tensor has none."""
        digests = [record.sha256 for record in self.tensors.values() if record.sha256 is not None]
        return combine_digests(digests) if len(digests) == len(self.tensors) else None

    def to_json(self) -> str:
        """The content of ``conversion.json``."""
        return json.dumps({"fingerprint": self.fingerprint, **asdict(self)}, indent=1) + "\n"


def read_manifest(folder: Path, field: str) -> Manifest | None:
    """The manifest in ``folder``; None if there is none.

    Raises:
        UserError: naming ``field`` if it is unreadable or inconsistent.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    content = read_json_object(path, field, "copy the checkpoint again")
    try:
        fingerprint = content.pop("fingerprint" if "fingerprint" in content else "receipt")  # the name in earlier versions
        tensors = {
            name: TensorRecord(**{**record, "shape": tuple(record["shape"])}) for name, record in content.pop("tensors").items()
        }
        manifest = Manifest(tensors, **content)
        if manifest.fingerprint != fingerprint:
            raise ValueError("its fingerprint does not match its tensors")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(field, path, f"is damaged ({error})", "copy the checkpoint again") from error
    return manifest


def gaps(tensors: Iterable[StoredTensor], files: Mapping[Path, int]) -> dict[Path, list[tuple[int, int]]]:
    """The ranges (start, stop) of each file that belong to no tensor.

    >>> from nft_megatron.convert.blocks import whole
    >>> import torch
    >>> gaps([whole("a", torch.uint8, (3,), Path("f"), 2), whole("b", torch.uint8, (4,), Path("f"), 5)], {Path("f"): 12})
    {PosixPath('f'): [(0, 2), (9, 12)]}
    """
    taken: dict[Path, list[tuple[int, int]]] = {file: [] for file in files}
    for tensor in tensors:
        for block in tensor.blocks:
            rows = [(block.offset, block.num_rows * block.width)]
            if block.width != block.pitch:
                rows = [(block.offset + row * block.pitch, block.width) for row in range(block.num_rows)]
            taken[block.file] += [(start, start + length) for start, length in rows]
    free: dict[Path, list[tuple[int, int]]] = {}
    for file, ranges in taken.items():
        free[file] = []
        position = 0
        for start, stop in [*sorted(ranges), (files[file], files[file])]:
            if start > position:
                free[file].append((position, start))
            position = max(position, stop)
    return free


def sha256(parts: Iterable[bytes]) -> str:
    """SHA-256 of the given bytes in order, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
