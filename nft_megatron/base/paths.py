"""Paths as people write them, in configurations and on the command line."""

from __future__ import annotations

from pathlib import Path

from nft_megatron.base.errors import UserError


def expand(path: Path | str) -> Path:
    """``path`` with a leading ``~`` or ``~user`` replaced by that home folder, as a shell would.

    A shell leaves the tilde where it follows something else, as in ``run_dir=~/runs`` or ``--out=~/page.html``. Raises
    ``ValueError`` if this machine knows no such user.

    >>> expand("runs/a~1").as_posix()
    'runs/a~1'
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"this machine knows no home folder {Path(path).parts[0]}") from error


def check_model_folder(folder: Path, field: str) -> None:
    """Raise :class:`UserError` naming ``field`` unless the Hugging Face model folder exists: said before what it lacks."""
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "no such folder"
        raise UserError(field, folder, problem, "give the path of a Hugging Face model folder (nothing is downloaded)")
