"""RUN/fleet: how servers on other machines are found, and the key that all of a run's servers require.

    RUN/fleet/key            this run's key, readable only by its owner
        <name>.json          a server that someone runs for it: a ``Registration``, renewed while the server is alive
        python/<hash>/       the package, for servers that run under another Python; one per location of the package

A server joins by writing its file and leaves by deleting it. If a file is not renewed for ten minutes, its server is forgotten.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

import msgspec

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.errors import UserError
from nft_megatron.rollout.fleet.server import new_key

_FORGOTTEN_SECONDS = 600.0  # longer than any two machines' clocks differ
_MAX_BYTES = 1 << 16
_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")
_TAKEN = ("local-", "url-")  # names of servers that do not register


@dataclass(frozen=True)
class Registration:
    """A server that registered itself. ``started`` tells its processes apart; times are seconds since 1970. ``server_id``: by
    what it proves itself (``access.py``).

    >>> Registration("node7-0", "http://node7:20001", "node7", 4711, started=1.8e9, heartbeat=1.8e9 + 60).url
    'http://node7:20001'
    """

    name: str
    url: str
    host: str
    pid: int
    started: float
    heartbeat: float
    server_id: str = ""


def register(folder: Path, registration: Registration) -> None:
    """Write, or renew, a server's file."""
    with atomic_file(folder / f"{registration.name}.json") as temporary:
        temporary.write_text(json.dumps(asdict(registration)))


def withdraw(folder: Path, name: str) -> None:
    """Leave the fleet."""
    (folder / f"{name}.json").unlink(missing_ok=True)


def check_name(name: str) -> None:
    """Raise ``UserError`` if a server cannot register under ``name``."""
    if not _NAME.fullmatch(name) or name.startswith(_TAKEN):
        remedy = "use letters, digits, '.', '_' and '-', and another beginning than local- and url-"
        raise UserError("--name", repr(name), "is no name for a server", remedy)


def discover(
    folder: Path,
    known: Mapping[str, Registration] = MappingProxyType({}),
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Registration]:
    """The registered servers by name. ``tell`` is told of each file that is not the registration of a server, and why.

    For a file that cannot be read, as happens on a network disk while it is being replaced, the ``known`` registration still
    holds. Raises ``OSError`` if the folder cannot be listed, which says nothing about the servers.
    """
    found = {}
    names = [name for name in sorted(os.listdir(folder)) if name.endswith(".json") and not name.startswith(".")]
    for path in (folder / name for name in names):
        try:
            registration = _read(path, known)
        except ValueError as problem:
            tell(f"{path} is not the registration of a server: {problem}")
            continue
        if registration is not None and abs(time.time() - registration.heartbeat) < _FORGOTTEN_SECONDS:
            found[path.stem] = registration
    return found


def _read(path: Path, known: Mapping[str, Registration]) -> Registration | None:
    """The registration in a file; None if it has been deleted. Raises ``ValueError`` for anything else."""
    try:
        text = _own_text(path)
    except FileNotFoundError:
        return None
    except OSError:
        return known.get(path.stem)
    try:
        registration = msgspec.json.decode(text, type=Registration)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from error
    check_name(registration.name)
    if registration.name != path.stem:
        raise ValueError(f"it names {registration.name}")
    if not (math.isfinite(registration.started) and math.isfinite(registration.heartbeat)):
        raise ValueError("its times are not finite")
    url = urlsplit(registration.url)
    is_plain = url.scheme == "http" and url.hostname and url.port and url.netloc.isprintable() and "@" not in url.netloc
    if not is_plain or registration.url != f"http://{url.netloc}":
        raise ValueError(f"its url is not http://host:port: {registration.url[:200]!r}")
    return registration


def _own_text(path: Path) -> bytes:
    """The content of a short regular file of this user. Raises ``ValueError``, at once, if it is anything else."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("it is not a regular file")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):  # replaced just now
            raise ValueError("it is not a regular file")
        if found.st_uid != os.geteuid():
            raise ValueError(f"it belongs to user {found.st_uid}, not {os.geteuid()}")
        text = os.read(descriptor, _MAX_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(text) > _MAX_BYTES:
        raise ValueError(f"it is longer than {_MAX_BYTES:,} bytes")
    return text


def run_key(folder: Path) -> str:
    """The run's key, created on first use. Raises ``UserError`` if its file is not one that this user made."""
    path = folder / "key"
    if not os.path.lexists(path):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".tmp-{os.getpid()}-key"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(new_key())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # if two processes race, one wins and both read the same key
        temporary.unlink()
    try:
        _own_text(path)
    except ValueError as problem:
        raise UserError("RUN/fleet/key", path, str(problem), "delete it: the run makes a new one") from problem
    except OSError:
        pass  # read_key says why
    return read_key(path)


def read_key(path: Path) -> str:
    """The key in a file. Raises ``UserError`` if there is none."""
    try:
        with path.open("rb") as file:
            key = file.read(_MAX_BYTES).decode("ascii").strip()
    except OSError as error:
        raise UserError(
            "fleet.key_file", path, error.strerror or "unreadable", "give a file that holds the servers' key"
        ) from error
    except ValueError as error:
        raise UserError("fleet.key_file", path, "is not text in ASCII", "give a file that holds the servers' key") from error
    if not key:
        raise UserError("fleet.key_file", path, "is empty", "write the servers' key into it")
    if not key.isprintable() or " " in key:
        raise UserError("fleet.key_file", path, "holds more than one word", "leave only the servers' key in it")
    return key
