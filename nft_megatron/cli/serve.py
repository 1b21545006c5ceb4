"""``nft-megatron serve``: a server on another machine for a run's fleet."""

from __future__ import annotations

import argparse
import os
import socket

from nft_megatron.cli.arguments import describe, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Help and arguments of this command."""
    describe(
        parser,
        _run,
        "Run a vLLM server for the fleet of a run whose folder this machine sees. It registers there, gets the weights from "
        "the trainer, is restarted if it dies, and may join at any time; it leaves on TERM. See docs/fleet.md.",
    )
    parser.add_argument("config", metavar="CONFIG|RUN", type=user_path, help="the run's configuration, or its folder")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", default=[], help="override the file's value")
    parser.add_argument(
        "--name",
        default=default_name(),
        help="name of the server (default: under Slurm the node and its task, else host and process)",
    )
    parser.add_argument(
        "--devices", help="CUDA_VISIBLE_DEVICES of the server; auto: this Slurm task's share of the node's GPUs"
    )
    parser.add_argument("--wait", type=float, default=900.0, help="longest wait for RUN/config.yaml in seconds (%(default)s)")


def default_name() -> str:
    """Unique among a run's servers; under Slurm, stable across a server's restarts."""
    node, task = os.environ.get("SLURMD_NODENAME"), os.environ.get("SLURM_LOCALID")
    return f"{node}-{task}" if node and task else f"{socket.gethostname()}-{os.getpid()}"


def _run(options: argparse.Namespace) -> None:
    from nft_megatron.rollout.fleet.serve import run

    run(options)
