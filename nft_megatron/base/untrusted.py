"""Names and small JSON files that somebody else wrote: read without surprises, refused with one message."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from nft_megatron.base.errors import UserError

_MOST_BYTES = 1 << 26


def is_plain_name(name: object) -> bool:
    r"""Whether ``name`` is that of a file in a given folder, not a path that leads elsewhere.

    >>> [is_plain_name(name) for name in ("a.json", "../a", "/a", "..", "", "a\0", 5)]
    [True, False, False, False, False, False, False]
    """
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\0"} & set(name) and len(name) < 256


def read_text(path: Path, field: str, remedy: str) -> str:
    """The text of a regular file of at most 64 MiB.

    Raises:
        UserError: naming ``field`` and the file if it is anything else, or not UTF-8.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(field, path, "is not a file", remedy)
        if found.st_size > _MOST_BYTES:
            raise UserError(field, path, f"has {found.st_size:,} bytes, more than {_MOST_BYTES:,}", remedy)
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(field, path, "is not there", remedy) from error
    except UnicodeDecodeError as error:
        raise UserError(field, path, f"is not text in UTF-8 ({error})", remedy) from error


def parse_json(text: str | bytes) -> Any:
    """The value of ``text``. Raises ``ValueError`` whatever is wrong with it.

    >>> parse_json("[" * 100_000)
    Traceback (most recent call last):
    ValueError: nested too deeply
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json_object(path: Path, field: str, remedy: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: naming ``field`` and the file, as :func:`read_text`, or if it is not JSON, too deep or not an object.
    """
    text = read_text(path, field, remedy)
    try:
        content = parse_json(text)
    except ValueError as error:
        problem = "is nested too deeply" if isinstance(error.__cause__, RecursionError) else f"is not JSON ({error})"
        raise UserError(field, path, problem, remedy) from error
    if not isinstance(content, dict):
        raise UserError(field, path, f"is not a JSON object but a {type(content).__name__}", remedy)
    return content
