"""The command ``nft-megatron``: its list of commands, its exit codes, and the record of a fault.

A command is a file in ``nft_megatron/cli/``, imported only when that command is given.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from nft_megatron import __version__
from nft_megatron.base.errors import EXIT_FAULT, EXIT_STOPPED_EARLY, StoppedEarly, UserError
from nft_megatron.base.rank_info import is_attempt, rank_info
from nft_megatron.base.run_folder import RunFolder, RunFolderTakenError
from nft_megatron.lifecycle.exit_report import ExitReport, phase_of, write_exit_report, write_if_responsive

COMMANDS = {
    "train": "train, or resume a run",
    "plan": "estimate memory, time and layouts of a run before it starts",
    "eval": "measure a Hugging Face model folder on benchmarks or held-out questions",
    "doctor": "check what is installed, which fast paths are on, how to get what is missing",
    "overlap": "find evaluation questions that are in the training data",
    "verify": "grade a file of answers",
    "report": "write a run's report page",
    "replay": "retrain a recorded step, under another layout or algorithm",
    "serve": "run a vLLM server on another machine for a run's fleet",
    "slurm": "train as a batch job that resumes by itself: render, submit, status, logs, stop, …",
    "convert": "convert Hugging Face folders to Megatron checkpoints and back, with proof",
}
"""Name, which is also its file's, and purpose."""

DISK_FULL = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space")
DISK_AWAY = dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN), "make sure that it can be reached")
REMEDIES = DISK_FULL | DISK_AWAY
"""Remedies for file-system errors after which nothing saved is lost."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and end the process.

    0 done, 2 wrong input, 75 stopped early with everything saved, 130 interrupted, 1 a fault.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    options = _parse(arguments)
    code = _run(options)
    sys.stdout.flush()
    sys.stderr.flush()
    if code and "torch" in sys.modules:
        os._exit(code)  # after a failure, open process groups would abort the interpreter's own exit
    sys.exit(code)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse does not find CONFIG and overrides after an option (``eval MODEL --out FILE CONFIG a.b=1``): add them."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser(next((word for word in words if not word.startswith("-")), None))
    options, rest = parser.parse_known_args(words)
    if rest and getattr(options, "config", rest) is None and "=" not in rest[0] and not rest[0].startswith("-"):
        options.config = rest.pop(0)
    if rest and not (hasattr(options, "overrides") and all("=" in word and not word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser(given: str | None) -> argparse.ArgumentParser:
    """Knows the arguments of the ``given`` command and the names of the others."""
    parser = argparse.ArgumentParser(
        prog="nft-megatron",
        description="Train language models on their own verified answers (NFT, arXiv 2505.18116) on Megatron-Core.",
        epilog="Exit codes: 0 done; 2 the input is wrong; 75 stopped early with everything saved, run again to resume; "
        "70 a rank hung; 130 interrupted; anything else a fault, whose cause a run records in RUN/logs.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose)
        if name == given:
            importlib.import_module(f"nft_megatron.cli.{name}").add_arguments(command)
    return parser


def _run(options: argparse.Namespace) -> int:
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        run(options)
    except (UserError, StoppedEarly) as error:
        return _end(options, error.exit_code, str(error), error)
    except KeyboardInterrupt as error:
        return _end(options, 128 + signal.SIGINT, "interrupted; the same command resumes from the last checkpoint", error)
    except Exception as error:
        if (trouble := _trouble_of_disk(error)) is not None:
            remedy = f"{REMEDIES[trouble.errno or 0]} and run the same command again"
            message = f"{trouble.filename or 'run_dir'}: {trouble.strerror}; {remedy}"
            return _end(options, EXIT_STOPPED_EARLY, message, error)
        _leave_fault(options, error)
        raise
    return 0


def _end(options: argparse.Namespace, code: int, message: str, error: BaseException) -> int:
    """Report how the command ended on standard error (only the first rank does) and in the run folder; return ``code``."""
    if rank_info().rank == 0:
        print(f"nft-megatron: {message}", file=sys.stderr)
    _leave_exit_report(options, code, message, error)
    return code


def _trouble_of_disk(error: BaseException | None) -> OSError | None:
    """The file-system error, such as "no space left", at the root of ``error``, if there is one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in REMEDIES:
            return error
        error = error.__cause__ or error.__context__
    return None


def _leave_fault(options: argparse.Namespace, error: Exception) -> None:
    """Write the cause of a fault to the run folder, one file per rank."""
    run_dir: Path | None = getattr(options, "run_dir", None)
    if run_dir is not None:
        path, text = RunFolder(run_dir).fault(rank_info().rank), traceback.format_exc()

        def write() -> None:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

        write_if_responsive(write)
    _leave_exit_report(options, EXIT_FAULT, f"{type(error).__name__}: {error}", error)


def _leave_exit_report(options: argparse.Namespace, code: int, message: str, error: BaseException) -> None:
    """Write an exit report for whoever started this rank, unless the folder belongs to another process."""
    run_dir: Path | None = getattr(options, "run_dir", None)
    if run_dir is not None and (is_attempt() or not isinstance(error, RunFolderTakenError)):
        write_exit_report(run_dir, ExitReport.here(code, message, phase_of(error)))
