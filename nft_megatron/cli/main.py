"""The command ``nft-megatron``: its list of commands and how its arguments are read.

A command is a file in ``nft_megatron/cli/``, imported only when that command is given.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Collection, Sequence

from nft_megatron.base.output import OutputError, guarded_output
from nft_megatron.base.version import __version__

COMMANDS = {
    "init": "write a first configuration for a model and a file of questions",
    "train": "train, or resume a run",
    "plan": "estimate memory, time and layouts of a run before it starts",
    "eval": "measure a Hugging Face model folder on benchmarks or held-out questions",
    "doctor": "check what is installed, which fast paths are on, how to get what is missing",
    "overlap": "find evaluation questions that are in the training data",
    "verify": "grade a file of answers",
    "report": "write a run's report page",
    "fork": "begin a new run from a step of another, with other settings",
    "replay": "retrain a recorded step, under another layout or algorithm",
    "serve": "run a vLLM server on another machine for a run's fleet",
    "slurm": "train as a batch job that resumes by itself: render, submit, status, logs, stop, …",
    "convert": "convert Hugging Face folders to Megatron checkpoints and back, with proof",
    "completion": "print the script with which bash, zsh or fish complete these commands",
}
"""Name, which is also its file's, and purpose."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and end the process.

    0 done, 2 wrong input, 75 stopped early with everything saved, 130 interrupted, 141 nobody reads its output, 1 a fault.
    """
    try:
        with guarded_output():
            options = _parse(arguments)
            from nft_megatron.cli.outcome import run_command  # not before: help needs nothing of it

            code = run_command(options)
    except OutputError as error:
        code = error.exit_code
        if not error.is_quiet:
            print(f"nft-megatron: {error.message}", file=sys.stderr)
    if code and "torch" in sys.modules:
        os._exit(code)  # after a failure, open process groups would abort the interpreter's own exit
    sys.exit(code)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse does not find CONFIG and overrides after an option (``eval MODEL --out FILE CONFIG a.b=1``): add them."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = build_parser(words)
    options, rest = parser.parse_known_args(words)
    if rest and getattr(options, "config", rest) is None and "=" not in rest[0] and not rest[0].startswith("-"):
        options.config = rest.pop(0)
    if rest and not (hasattr(options, "overrides") and all("=" in word and not word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def build_parser(words: Collection[str]) -> argparse.ArgumentParser:
    """Knows the arguments of the commands that are among ``words``, and the names of the others."""
    parser = argparse.ArgumentParser(
        prog="nft-megatron",
        description="Train language models on their own verified answers (NFT, arXiv 2505.18116) on Megatron-Core.",
        epilog="Exit codes: 0 done; 2 the input is wrong; 75 stopped early with everything saved, run again to resume; "
        "70 a rank hung; 130 interrupted; 141 nobody reads its output; anything else a fault, whose cause is in RUN/logs.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose)
        if name in words:
            importlib.import_module(f"nft_megatron.cli.{name}").add_arguments(command)
    return parser
