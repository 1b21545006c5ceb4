"""The source of a user's own algorithm, which a run keeps to from its first start on. Called on rank 0."""

from __future__ import annotations

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.errors import UserError
from nft_megatron.base.imported import is_import_path, source_hash
from nft_megatron.base.run_folder import RunFolder


def keep_source(folder: RunFolder, algorithm: str) -> None:
    """Write the hash of the source of ``algorithm``, if that is an import path, into the run folder.

    Raises:
        UserError: the run has begun with another source.
    """
    if not is_import_path(algorithm):
        return
    now = f"{algorithm}/{source_hash(algorithm, 'algorithm.name')}"
    if folder.has_begun and folder.algorithm.exists():
        before = folder.algorithm.read_text(encoding="utf-8").strip()
        if before != now:
            raise UserError(
                "algorithm.name",
                algorithm,
                f"the run in {folder.root} was started with the source {before}; it is {now} now",
                "restore the source, or begin a new run from a step of this one with `nft-megatron fork`",
            )
    with atomic_file(folder.algorithm) as temporary:
        temporary.write_text(f"{now}\n")
