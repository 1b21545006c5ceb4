"""A run's own folders, to write to and delete from: those in its run folder, and what its links lead to, once claimed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.errors import UserError

_CLAIM = ".nft_megatron_run"


class ForeignFolderError(UserError):
    """The run folder, or what a link in it leads to, belongs to something else."""


def claim(folder: Path, root: Path) -> None:
    """Claim what ``folder``, one of the folders in the run folder ``root``, leads to, if it is a link to elsewhere.

    Checkpoints may lie on another disk, but not where another run's lie: each would resume from the other's and delete them. A
    file there keeps the path of the link; it counts for as long as that link leads there.

    Raises :class:`ForeignFolderError` if another run was first, or the link leads to no folder.
    """
    own, target = root.resolve(), folder.resolve()
    if not folder.is_symlink() or target.is_relative_to(own):
        return
    if not target.is_dir():
        raise ForeignFolderError("run_dir", folder, f"leads to {target}, which is no folder", "create it, or remove the link")
    link = own / folder.relative_to(root)
    owner = _owner(target)
    if owner not in (None, link):
        problem = f"leads to {target}, as {owner} of another run does"
        raise ForeignFolderError("run_dir", folder, problem, "give every run a folder of its own")
    if owner is None:
        with atomic_file(target / _CLAIM) as temporary:
            temporary.write_text(f"{link}\n")


def _owner(target: Path) -> Path | None:
    """Which folder of a run leads to ``target``, as far as ``target`` or its place tells."""
    if all((target.parent / name).exists() for name in ("lock", "config.yaml")):
        return target  # a run's own folder, without a link
    with contextlib.suppress(OSError, ValueError):
        link = Path((target / _CLAIM).read_text(encoding="utf-8").strip())
        if link.is_absolute() and os.path.samefile(link, target):
            return link
    return None
