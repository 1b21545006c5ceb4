"""A worker process of the embedded engine: takes commands, loads weights, generates.

Started by ``pool.py`` as ``python -m nft_megatron.rollout.worker``, not by multiprocessing, so that the trainer's own main
module is never imported a second time. Commands are ``(ticket, name, arguments)``; every reply carries its command's ticket:

    load (entries, version)         → loaded (fingerprint)
    generate (requests, sampling)   → answer (completion) …, done
    any                             → refused (a UserError's four fields) or fault (traceback)

A new command ends a generation in progress: the parent has given it up.
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
    """What a worker is told on its command line."""

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
    """Waits for: commands. Ends the process with its parent, whether that closed the connection or was killed.

    The process id is looked at because another child of the parent may hold a copy of its end of the connection.
    """
    try:
        while os.getppid() == parent:
            if connection.poll(0.5):
                inbox.put(connection.recv())
    except (EOFError, OSError):
        pass  # the connection is closed: this is how a worker is told to end
    os._exit(0)


def main(settings: WorkerSettings) -> None:
    """Serve until the parent closes the connection or dies."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # meant for the trainer, whose end ends this process
    connection = Connection(settings.connection)
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_read_commands, args=(connection, settings.parent, inbox), daemon=True).start()

    # These imports take seconds; workers make them side by side while the trainer sets itself up.
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
