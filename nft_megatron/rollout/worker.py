"""A worker process of the embedded engine: takes commands, loads weights, generates.

``pool.py`` starts it as ``python -m nft_megatron.rollout.worker`` rather than by multiprocessing, so that the trainer's main
module is not imported a second time. Commands are ``(ticket, name, arguments)``; every reply carries its command's ticket:

    load (entries, version)         → loaded (fingerprint)
    generate (requests, sampling)   → answer (completion) …, done
    any                             → refused (a UserError's four fields) or fault (traceback)

A new command ends a generation in progress, which the parent has then given up.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any


@dataclass(frozen=True)
class WorkerSettings:
    """A worker's settings, as one JSON argument on its command line."""

    model_folder: str
    batch_size: int
    threads: int
    dtype: str
    parent: int
    connection: int
    weights: int

    def to_argument(self) -> str:
        return json.dumps(asdict(self))


def _read_commands(connection: Connection, parent: int, inbox: SimpleQueue[Any]) -> None:
    """Waits for: commands. Ends this process when the parent closes the connection or is killed.

    The parent's process id is checked too, because another child may hold a copy of the parent's end of the connection.
    """
    try:
        while os.getppid() == parent:
            if connection.poll(0.5):
                inbox.put(connection.recv())
    except (EOFError, OSError):
        pass  # the connection is closed, which asks a worker to exit
    os._exit(0)


def main(settings: WorkerSettings) -> None:
    """Serve until the parent closes the connection or dies."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # meant for the trainer; this process exits when the trainer does
    connection = Connection(settings.connection)
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_read_commands, args=(connection, settings.parent, inbox), daemon=True).start()

    # These imports take seconds; workers run them in parallel while the trainer sets up.
    import torch

    from nft_megatron.base.errors import UserError
    from nft_megatron.rollout.decode import Decoder
    from nft_megatron.rollout.shared_weights import read_weights

    torch.set_num_threads(settings.threads)
    decoder: Decoder | None = None
    while True:
        ticket, command, arguments = inbox.get()
        try:
            decoder = decoder or Decoder(Path(settings.model_folder), settings.batch_size, getattr(torch, settings.dtype))
            if command == "load":
                entries, version = arguments
                fingerprint = decoder.load(read_weights(settings.weights, entries), version)
                connection.send((ticket, "loaded", fingerprint))
            else:
                assert command == "generate", command
                for finished in decoder.steps(*arguments):
                    connection.send((ticket, "answers", finished))
                    if not inbox.empty():
                        break
                connection.send((ticket, "done", None))
        except BrokenPipeError:
            return  # the parent is gone
        except UserError as error:
            connection.send((ticket, "refused", (error.field, error.value, error.problem, error.remedy)))
        except Exception:
            connection.send((ticket, "fault", traceback.format_exc()))


if __name__ == "__main__":
    main(WorkerSettings(**json.loads(sys.argv[1])))
