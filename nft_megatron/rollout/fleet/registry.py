"""RUN/fleet: how servers on other machines are found, and the key that all of a run's servers ask for.

    RUN/fleet/key            of this run, readable by its owner alone
        <name>.json          a server that somebody runs for it: ``Registration``, written again and again while it lives
        python/<hash>/       the package, for servers that run under another Python; one for each place that it is in

A server joins by writing its file and leaves by deleting it. One whose file has not been renewed for ten minutes is forgotten.
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
    """The registered servers by name. A file that is no registration is left alone; of one that is there and cannot be read,
    as happens on a network disk while it is renamed over, what was ``known`` still holds.

    Raises ``OSError`` where the folder cannot be listed: that says nothing about the servers.
    """
    found = {}
    for path in (folder / name for name in sorted(os.listdir(folder)) if name.endswith(".json")):
        with contextlib.suppress(ValueError, TypeError):  # it is something else
            registration = _read(path, known)
            if registration is None or registration.name != path.stem:
                continue
            if time.time() - registration.heartbeat < _FORGOTTEN_SECONDS:
                found[registration.name] = registration
    return found


def _read(path: Path, known: Mapping[str, Registration]) -> Registration | None:
    """None: it was deleted meanwhile."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except OSError:
        return known.get(path.stem)
    return Registration(**json.loads(text))


def run_key(folder: Path) -> str:
    """The run's key; whoever asks first makes it."""
    path = folder / "key"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".tmp-{os.getpid()}-key"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(new_key())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # of two that come at once one wins, and both read the same
        temporary.unlink()
    return read_key(path)


def read_key(path: Path) -> str:
    """The key in a file; raises ``UserError`` where there is none."""
    try:
        key = path.read_text().strip()
    except OSError as error:
        raise UserError(
            "fleet.key_file", path, error.strerror or "unreadable", "give a file that holds the servers' key"
        ) from error
    if not key:
        raise UserError("fleet.key_file", path, "is empty", "write the servers' key into it")
    return key
