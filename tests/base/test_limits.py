"""Limits of the machine end a command with one line that names the remedy; the traceback goes to the run folder."""

import argparse
import errno
import os
import resource
import subprocess
import sys

import pytest

from nft_megatron.base.limits import limit_reached
from nft_megatron.cli.outcome import run_command


class OutOfMemoryError(RuntimeError):
    """As torch's."""


def chained(error: Exception) -> Exception:
    outer = RuntimeError("a step failed")
    outer.__cause__ = error
    return outer


LIMITS = [
    (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a.parquet"), "too many open files"),
    (OSError(errno.ENFILE, os.strerror(errno.ENFILE)), "too many open files"),
    (ImportError("libx.so: cannot open shared object file: Too many open files"), "too many open files"),
    (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "no further process or thread"),
    (RuntimeError("can't start new thread"), "no further process or thread"),
    (MemoryError(), "out of memory"),
    (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "out of memory"),
    (ImportError("libtorch.so: failed to map segment from shared object"), "out of memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of GPU memory"),
    (chained(MemoryError()), "out of memory"),
]


@pytest.mark.parametrize(
    ("error", "limit"), LIMITS, ids=lambda value: type(value).__name__ if isinstance(value, Exception) else ""
)
def test_a_limit_is_one_line_and_its_traceback_in_the_run_folder(tmp_path, capsys, error, limit):
    def run(options: argparse.Namespace) -> None:
        raise error

    assert run_command(argparse.Namespace(run=run, run_dir=tmp_path)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nft-megatron: {limit}") and ("limit" in line or "lower" in line)
    assert type(error).__name__ in line
    assert "in run_command" in (tmp_path / "logs" / "fault_rank0.txt").read_text()


@pytest.mark.parametrize(
    "error", [ValueError("odd"), OSError(errno.ENOENT, "gone"), RuntimeError("memory of an elephant"), None]
)
def test_other_faults_keep_their_traceback(error):
    assert limit_reached(error) is None


PROGRAMS = {
    "files": ("held = [open('/dev/null') for _ in range(100)]", resource.RLIMIT_NOFILE, 30, 1, "too many open files"),
    "memory": ("bytearray(1 << 36)", resource.RLIMIT_AS, 1 << 32, 1, "out of memory"),
    "size of a file": (
        "open('big', 'wb').write(bytes(1 << 20))",
        resource.RLIMIT_FSIZE,
        1 << 10,
        75,
        "run_dir: File too large",
    ),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_real_limit(tmp_path, kind):
    action, limit, value, code, message = PROGRAMS[kind]
    program = f"""
import argparse, resource, sys
from nft_megatron.cli.outcome import run_command

def run(options):
    resource.setrlimit({limit}, ({value}, {value}))
    {action}

sys.exit(run_command(argparse.Namespace(run=run)))
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    (line,) = ended.stderr.splitlines()
    assert (ended.returncode, line.partition(": ")[0]) == (code, "nft-megatron")
    assert message in line and "limit" in line
