"""A rollout node's process: one vLLM server that registers with a run and is restarted when it dies.

    nft-megatron serve CONFIG [--name NAME] [--devices 0,1] [section.key=value …]

The trainer finds it in RUN/fleet and sends it weights; it may join at any time. On TERM it leaves: it withdraws, so that it
gets no more work, then stops its server.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

from nft_megatron.base.backoff import Backoff
from nft_megatron.base.deadline import Deadline
from nft_megatron.base.errors import UserError
from nft_megatron.config.load import load_config
from nft_megatron.config.schema import Config
from nft_megatron.rollout.fleet.control import Control, ControlError
from nft_megatron.rollout.fleet.fleet import server_seed
from nft_megatron.rollout.fleet.health import Health, State
from nft_megatron.rollout.fleet.registry import Registration, check_name, register, withdraw
from nft_megatron.rollout.fleet.server import Server, check_installed
from nft_megatron.rollout.fleet.settings import server_settings

log = logging.getLogger(__name__)

_CHECK_SECONDS = 2.0


class Node:
    """One server and its registration. :meth:`run` returns after :meth:`leave`, which a signal handler may call."""

    def __init__(self, config: Config, name: str, devices: str | None) -> None:
        self._config, self._name, self._devices = config, name, devices
        self._settings = server_settings(config)
        self._leaving = threading.Event()

    def leave(self) -> None:
        """Withdraw, stop the server, and let :meth:`run` return."""
        self._leaving.set()

    def run(self) -> None:
        """Keep a server running until :meth:`leave` is called."""
        backoff = Backoff()
        while not self._leaving.is_set():
            try:
                if self._serve():
                    backoff.reset()
            except Exception:  # the disk is full or away, the server sent something odd: the next attempt may succeed
                log.exception("%s: this attempt failed", self._name)
            if self._leaving.wait(backoff.next_delay()):
                return
            log.warning("%s: restarting its server", self._name)

    def _serve(self) -> bool:
        """Run one server from start to end. Returns whether it was up."""
        server = Server(self._settings, self._name, server_seed(self._config.seed, self._name), self._devices)
        try:
            return self._watch(server)
        finally:
            try:
                withdraw(self._settings.folder, self._name)
            finally:
                server.stop()

    def _watch(self, server: Server) -> bool:
        """Register the server once it is up; return, when it dies or must leave, whether it was up.

        vLLM does not answer while it loads weights, so silence is a fault only if it lasts longer. Until then the server stays
        registered.
        """
        control = Control(server.url, server.api_key, self._config.fleet.silence_seconds, server.server_id)
        settings, health = self._config.fleet, Health()
        start, silence = Deadline.of(settings.start_seconds), Deadline.of(settings.sync_seconds)
        now, host = time.time(), socket.gethostname()
        registration = Registration(self._name, server.url, host, os.getpid(), now, now, server.server_id)
        while server.is_alive() and health.state is not State.DEAD and not self._leaving.is_set():
            try:
                health = health.answered(control.version())
                silence = Deadline.of(settings.sync_seconds)
            except ControlError as error:
                if not error.silent:
                    health = health.failed(str(error))
                elif health.state is not State.STARTING and silence.has_passed:
                    health = health.exited(f"no answer for {settings.sync_seconds:g} s: {error}")
            if health.state is State.STARTING:
                if start.has_passed:
                    log.warning("%s: its server is not up after %g s", self._name, settings.start_seconds)
                    return False
            elif health.state is not State.DEAD and health.num_failures == 0:
                try:
                    register(self._settings.folder, replace(registration, heartbeat=time.time()))
                except OSError as error:  # retried at every check; a run forgets the server after ten minutes
                    log.warning("%s: could not renew its registration: %s", self._name, error)
            self._leaving.wait(_CHECK_SECONDS)
        if not self._leaving.is_set():
            cause = health.reason or "its processes exited"
            log.warning("%s: its server died (%s); last lines of %s:\n%s", self._name, cause, server.log, server.log_tail())
        return health.state is not State.STARTING


def find_config(path: Path, overrides: list[str], seconds: float) -> Config:
    """The configuration in a file, or in a run folder; waits up to ``seconds`` for the trainer to write the latter."""
    deadline = Deadline.of(seconds)
    if path.suffix not in (".yaml", ".yml"):
        path = path / "config.yaml"
        if not path.is_file():
            log.warning("waiting for %s, %g s at most: the trainer writes it", path, seconds)
        while not path.is_file():
            if deadline.has_passed:
                raise UserError(
                    "CONFIG", path, f"has not appeared for {seconds:g} s", "start the trainer, or pass its config file"
                )
            time.sleep(_CHECK_SECONDS)
    return load_config(path, overrides)


def task_devices(tensor_parallel: int) -> str | None:
    """The GPUs of this task's server on a node that runs one task per server; None without GPUs.

    Chosen from those that Slurm gave the node's step (CUDA_VISIBLE_DEVICES), or else from all.
    """
    if not torch.cuda.is_available():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    first = int(os.environ.get("SLURM_LOCALID", 0)) * tensor_parallel
    if first + tensor_parallel > len(devices):
        raise UserError(
            "--devices",
            "auto",
            f"task {os.environ.get('SLURM_LOCALID')} needs {tensor_parallel} of {len(devices)} GPUs, but too few are left",
            "start at most GPUs / fleet.tensor_parallel tasks per node",
        )
    return ",".join(devices[first : first + tensor_parallel])


def run(options: argparse.Namespace) -> None:
    """Serve until TERM or Ctrl-C."""
    check_name(options.name)
    config = find_config(options.config, options.overrides, options.wait)
    check_installed(str(config.fleet.python or sys.executable))
    devices = task_devices(config.fleet.tensor_parallel) if options.devices == "auto" else options.devices
    node = Node(config, options.name, devices)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: node.leave())
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # meant for the trainers; Slurm sends it to all steps of a job
    node.run()
