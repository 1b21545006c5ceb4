"""Files that appear complete or not at all: written under a temporary name, flushed to disk, renamed.

A temporary name starts with ``.tmp-`` and is created next to its target, so that the rename never crosses file systems and a
killed process leaves only what :func:`remove_leftovers` deletes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

_PREFIX = ".tmp-"
_LEFTOVER = re.compile(rf"{re.escape(_PREFIX)}(old-)?[0-9]+-.+")


def fsync_path(path: Path) -> None:
    """Flush one file, or one folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path, *, make_folder: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write to; on a clean exit it replaces ``path``, otherwise it is deleted.

    ``make_folder``: create the folder of ``path`` if it is missing. False for files of a run: if its folder disappeared with
    a file system, a new one of the same name must not take its place.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "latest"
    >>> with atomic_file(target) as temporary:
    ...     _ = temporary.write_text("step_000012")
    >>> target.read_text()
    'step_000012'
    """
    path = Path(path)
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{_PREFIX}{os.getpid()}-{path.name}"
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Like :func:`atomic_file` for a folder; one process writes it."""
    temporary = make_temporary_folder(Path(path))
    try:
        yield temporary
        publish_folder(temporary, Path(path))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def make_temporary_folder(path: Path, *, make_parent: bool = True) -> Path:
    """An empty folder next to ``path``, for :func:`publish_folder` to rename once it is complete.

    ``make_parent``: as ``make_folder`` of :func:`atomic_file`.
    """
    temporary = path.parent / f"{_PREFIX}{os.getpid()}-{path.name}"
    remove(temporary)
    temporary.mkdir(parents=make_parent)
    return temporary


def publish_folder(temporary: Path, path: Path) -> None:
    """Flush all of ``temporary`` and rename it to ``path``. An older ``path`` is moved aside first, deleted last."""
    for folder, _, names in os.walk(temporary):
        for name in names:
            fsync_path(Path(folder) / name)
        fsync_path(Path(folder))
    aside = path.parent / f"{_PREFIX}old-{os.getpid()}-{path.name}"
    if os.path.lexists(path):
        os.replace(path, aside)
    os.replace(temporary, path)
    fsync_path(path.parent)
    with contextlib.suppress(OSError):
        remove(aside)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half-written in ``folder``."""
    for leftover in Path(folder).glob(f"{_PREFIX}*"):
        if _LEFTOVER.fullmatch(leftover.name):
            remove(leftover)


def remove(path: Path) -> None:
    """Delete a file, a folder with all that it contains, or a link, whose target stays. Nothing may be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
