"""How a command ends: its exit code, the message that a user gets, and what is left of a fault in the run folder."""

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
from nft_megatron.base.rank_info import is_attempt, rank_info
from nft_megatron.base.run_folder import RunFolder, RunFolderTakenError
from nft_megatron.lifecycle.exit_report import ExitReport, if_it_answers, phase_of, write_exit_report

DISK_FULL = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space")
DISK_AWAY = dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN), "see that it can be reached")
REMEDIES = DISK_FULL | DISK_AWAY
"""Of what may befall a file system: nothing that was saved is lost."""


def run_command(options: argparse.Namespace) -> int:
    """Run the command of ``options`` and return its exit code; only a fault is raised, after its cause was written."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        run(options)
    except (UserError, StoppedEarly) as error:
        return _end(options, error.exit_code, str(error), error)
    except KeyboardInterrupt as error:
        return _end(options, 128 + signal.SIGINT, "interrupted; the same command goes on from the last checkpoint", error)
    except Exception as error:
        if (trouble := _trouble_of_disk(error)) is not None:
            remedy = f"{REMEDIES[trouble.errno or 0]} and run the same command again"
            message = f"{trouble.filename or 'run_dir'}: {trouble.strerror}; {remedy}"
            return _end(options, EXIT_STOPPED_EARLY, message, error)
        _leave_fault(options, error)
        raise
    return 0


def _end(options: argparse.Namespace, code: int, message: str, error: BaseException) -> int:
    """Say how the command ended, to standard error (of all ranks only the first) and in the run folder; return ``code``."""
    if rank_info().rank == 0:
        print(f"nft-megatron: {message}", file=sys.stderr)
    _leave_ending(options, code, message, error)
    return code


def _trouble_of_disk(error: BaseException | None) -> OSError | None:
    """The "no space left", or the like, at the root of ``error``, if that is what it is."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in REMEDIES:
            return error
        error = error.__cause__ or error.__context__
    return None


def _leave_fault(options: argparse.Namespace, error: Exception) -> None:
    """The cause of a fault in the run folder, one file a rank."""
    run_dir: Path | None = getattr(options, "run_dir", None)
    if run_dir is not None:
        path, text = RunFolder(run_dir).fault(rank_info().rank), traceback.format_exc()

        def write() -> None:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

        if_it_answers(write)
    _leave_ending(options, EXIT_FAULT, f"{type(error).__name__}: {error}", error)


def _leave_ending(options: argparse.Namespace, code: int, message: str, error: BaseException) -> None:
    """For whoever started this rank of a run, unless the folder is another process's."""
    run_dir: Path | None = getattr(options, "run_dir", None)
    if run_dir is not None and (is_attempt() or not isinstance(error, RunFolderTakenError)):
        write_exit_report(run_dir, ExitReport.here(code, message, phase_of(error)))
