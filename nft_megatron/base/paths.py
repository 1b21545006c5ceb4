"""Paths as people write them, in configurations and on the command line."""

from __future__ import annotations

import os
from pathlib import Path

from nft_megatron.base.errors import UserError

_LONGEST_PATH, _LONGEST_NAME = 4095, 255
"""In bytes, on Linux."""


def expand(path: Path | str) -> Path:
    """``path`` with a leading ``~`` or ``~user`` replaced by that home folder, as a shell would.

    A shell leaves the tilde where it follows something else, as in ``run_dir=~/runs`` or ``--out=~/page.html``.

    Raises:
        ValueError: this machine knows no such user, or no file can have such a name.

    >>> expand("runs/a~1").as_posix()
    'runs/a~1'
    """
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ValueError("has half a character, which no file name can have") from error
    if b"\0" in name:
        raise ValueError("has a null byte, which no file name can have")
    if len(name) > _LONGEST_PATH or any(len(part) > _LONGEST_NAME for part in name.split(b"/")):
        raise ValueError(f"is longer than a path may be: {_LONGEST_PATH} bytes, {_LONGEST_NAME} in each name")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"this machine knows no home folder {Path(path).parts[0]}") from error


def check_model_folder(folder: Path, field: str) -> None:
    """Raise :class:`UserError` naming ``field`` unless the Hugging Face model folder exists: said before what it lacks."""
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "no such folder"
        raise UserError(field, folder, problem, "give the path of a Hugging Face model folder (nothing is downloaded)")
