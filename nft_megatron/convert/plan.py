"""Which files a conversion will write and where each tensor goes in them, before anything is written. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nft_megatron.convert.blocks import StoredTensor


@dataclass(frozen=True)
class Target:
    """A folder to be.

    ``tensors``: where each Hugging Face tensor goes. ``files``: the files they lie in, with their sizes. ``parts``: the bytes
    of those files around tensors, as (file, offset, bytes). ``small``: whole other files, by name.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    files: Mapping[Path, int]
    parts: tuple[tuple[Path, int, bytes], ...]
    small: Mapping[str, bytes]

    @property
    def num_bytes(self) -> int:
        """What it will take on the disk, about."""
        return sum(self.files.values()) + sum(map(len, self.small.values()))
