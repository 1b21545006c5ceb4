"""How a command ends: its exit code, the message to the user, and the record of a fault in the run folder."""

from __future__ import annotations

import argparse
import errno
import logging
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from nft_megatron.base.errors import EXIT_FAULT, EXIT_STOPPED_EARLY, StoppedEarly, UserError
from nft_megatron.base.limits import limit_reached
from nft_megatron.base.output import OutputError
from nft_megatron.base.own_folder import ForeignFolderError
from nft_megatron.base.rank_info import is_attempt, rank_info
from nft_megatron.base.run_folder import RunFolder, RunFolderTakenError
from nft_megatron.lifecycle.exit_report import ExitReport, phase_of, write_exit_report, write_if_responsive

DISK_FULL = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit of a file's size (`ulimit -f`)",
}
DISK_AWAY = dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN), "make sure that it can be reached")
REMEDIES = DISK_FULL | DISK_AWAY
"""Remedies for file-system errors after which nothing saved is lost."""


def run_command(options: argparse.Namespace) -> int:
    """Run the command of ``options`` and return its exit code. A fault is raised, after its cause has been recorded."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        run(options)
    except (UserError, StoppedEarly) as error:
        return _end(options, error.exit_code, str(error), error)
    except OutputError:
        raise
    except KeyboardInterrupt as error:
        return _end(options, 128 + signal.SIGINT, "interrupted; the same command resumes from the last checkpoint", error)
    except Exception as error:
        if (trouble := _trouble_of_disk(error)) is not None:
            remedy = f"{REMEDIES[trouble.errno or 0]} and run the same command again"
            message = f"{trouble.filename or 'run_dir'}: {trouble.strerror}; {remedy}"
            return _end(options, EXIT_STOPPED_EARLY, message, error)
        _leave_fault(options, error)
        if (limit := limit_reached(error)) is not None:
            print(f"nft-megatron: {limit} ({_first_line(error)})", file=sys.stderr)
            return EXIT_FAULT
        raise
    return 0


def _first_line(error: BaseException) -> str:
    """The type of ``error`` and the first line of its text."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


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
    """Write an exit report for whoever started this rank, unless the folder belongs to another process or is no run's."""
    run_dir: Path | None = getattr(options, "run_dir", None)
    if isinstance(error, ForeignFolderError) or (isinstance(error, RunFolderTakenError) and not is_attempt()):
        return
    if run_dir is not None:
        write_exit_report(run_dir, ExitReport.here(code, message, phase_of(error)))
