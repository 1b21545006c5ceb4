"""RUN/fleet: how servers on other machines are found, and the key that all of a run's servers require.

    RUN/fleet/key            this run's key, readable only by its owner
        <name>.json          a server that someone runs for it: a ``Registration``, renewed while the server is alive
        python/<hash>/       the package, for servers that run under another Python; one per location of the package

A server joins by writing its file and leaves by deleting it. If a file is not renewed for ten minutes, its server is forgotten.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.errors import UserError
from nft_megatron.rollout.fleet.server import new_key

_FORGOTTEN_SECONDS = 600.0  # longer than any two machines' clocks differ


@dataclass(frozen=True)
class Registration:
    """A server that registered itself. ``started`` tells its processes apart; times are seconds since 1970.

    >>> Registration("node7-0", "http://node7:20001", "node7", 4711, started=1.8e9, heartbeat=1.8e9 + 60).url
    'http://node7:20001'
    """

    name: str
    url: str
    host: str
    pid: int
    started: float
    heartbeat: float


def register(folder: Path, registration: Registration) -> None:
    """Write, or renew, a server's file."""
    with atomic_file(folder / f"{registration.name}.json") as temporary:
        temporary.write_text(json.dumps(asdict(registration)))


def withdraw(folder: Path, name: str) -> None:
    """Leave the fleet."""
    (folder / f"{name}.json").unlink(missing_ok=True)


def discover(folder: Path, known: Mapping[str, Registration] = MappingProxyType({})) -> dict[str, Registration]:
    """The registered servers by name. Files that are not registrations are ignored. For one that cannot be read, as happens on
    a network disk while it is being replaced, the ``known`` registration still holds.

    Raises ``OSError`` if the folder cannot be listed, which says nothing about the servers.
    """
    found = {}
    for path in (folder / name for name in sorted(os.listdir(folder)) if name.endswith(".json")):
        with contextlib.suppress(ValueError, TypeError):  # not a registration
            registration = _read(path, known)
            if registration is None or registration.name != path.stem:
                continue
            if time.time() - registration.heartbeat < _FORGOTTEN_SECONDS:
                found[registration.name] = registration
    return found


def _read(path: Path, known: Mapping[str, Registration]) -> Registration | None:
    """The registration in a file; None if it has been deleted."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except OSError:
        return known.get(path.stem)
    return Registration(**json.loads(text))


def run_key(folder: Path) -> str:
    """The run's key, created on first use."""
    path = folder / "key"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".tmp-{os.getpid()}-key"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(new_key())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # if two processes race, one wins and both read the same key
        temporary.unlink()
    return read_key(path)


def read_key(path: Path) -> str:
    """The key in a file. Raises ``UserError`` if there is none."""
    try:
        key = path.read_text().strip()
    except OSError as error:
        raise UserError(
            "fleet.key_file", path, error.strerror or "unreadable", "give a file that holds the servers' key"
        ) from error
    if not key:
        raise UserError("fleet.key_file", path, "is empty", "write the servers' key into it")
    return key
