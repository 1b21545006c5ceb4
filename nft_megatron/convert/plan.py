"""Which files a conversion will write and where each tensor goes in them, before anything is written. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nft_megatron.convert.blocks import StoredTensor


@dataclass(frozen=True)
class Target:
    """A folder to be written.

    ``tensors``: where each Hugging Face tensor goes. ``files``: the files that hold tensors, with their sizes. ``parts``: the
    bytes around the tensors, as (file, offset, bytes). ``small``: the other files by name, with their content.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    files: Mapping[Path, int]
    parts: tuple[tuple[Path, int, bytes], ...]
    small: Mapping[str, bytes]

    @property
    def num_bytes(self) -> int:
        """Approximate size on disk."""
        return sum(self.files.values()) + sum(map(len, self.small.values()))
