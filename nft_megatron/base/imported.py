"""A user's own verifier or algorithm: an object named by its import path, ``my_package.my_module:name``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from pathlib import Path
from typing import Annotated, Any

from pydantic import StringConstraints

from nft_megatron.base.errors import UserError

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
ImportPath = Annotated[str, StringConstraints(pattern=rf"^{_NAME}(\.{_NAME})*:{_NAME}$")]
"""As ``my_package.my_module:name``."""
_REMEDY = "install its package, or put its folder on PYTHONPATH"


def is_import_path(text: str) -> bool:
    """Whether ``text`` names a module and something in it; nothing is imported.

    >>> is_import_path("my_package.my_module:grade"), is_import_path("strict"), is_import_path("http://127.0.0.1:8000")
    (True, False, False)
    """
    module, colon, name = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), name))


def import_object(path: str, field: str) -> Any:
    """What ``path`` names. Runs its module.

    Raises:
        UserError: naming ``field``; the module cannot be imported or has no such name.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError as error:
        raise UserError(field, path, f"the module {module} cannot give {name}: {error}", "correct the name") from error
    except Exception as error:  # whatever the module does when it is imported
        raise UserError(field, path, f"cannot be imported: {type(error).__name__}: {error}", _REMEDY) from error


def source_hash(path: str, field: str) -> str:
    """12 hexadecimal digits that change with the source of ``path``'s module. Runs nothing.

    A module of a package stands for all Python files of the package, since it may use any of them; a module alone for its file.

    Raises:
        UserError: naming ``field``; there is no such module, or it has no source.

    >>> source_hash("textwrap:dedent", "verify.mode") == source_hash("textwrap:fill", "verify.mode")
    True
    >>> source_hash("no_such_module:grade", "verify.mode")
    Traceback (most recent call last):
    nft_megatron.base.errors.UserError: verify.mode = no_such_module:grade: there is no module no_such_module; install its package, or put its folder on PYTHONPATH
    """  # noqa: E501 (one line of output)
    package = path.partition(":")[0].partition(".")[0]
    try:
        spec = importlib.util.find_spec(package)  # of a name without a dot: imports nothing
    except ValueError:
        spec = None
    if spec is None:
        raise UserError(field, path, f"there is no module {package}", _REMEDY)
    digest = hashlib.sha256()
    for name, file in _files(package, spec.origin, spec.submodule_search_locations):
        content = file.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


def _files(package: str, origin: str | None, folders: Any) -> list[tuple[str, Path]]:
    """The files of a package or of a module alone, each with the name by which it counts."""
    if folders is not None:
        roots = [Path(folder) for folder in folders]
        return sorted((str(file.relative_to(root)), file) for root in roots for file in root.rglob("*.py"))
    if origin is None or not Path(origin).is_file():
        raise UserError("module", package, "has no source file", "write a module that calls it")
    return [(package, Path(origin))]
