"""`make` picks the pinned versions by the version of the Python that it is given."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def dry_run(python: Path, *arguments: str) -> subprocess.CompletedProcess:
    venv = python.parent / "venv"
    command = ["make", "--dry-run", f"PYTHON={python}", f"VENV={venv}", *arguments, "setup"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def interpreter(folder: Path, version: str) -> Path:
    """A program that says that it is this version of Python."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(("version", "core"), [("3.11", "0.16.1"), ("3.12", "0.19.2"), ("3.13", "0.19.2")])
def test_the_constraints_follow_the_interpreter(tmp_path, version, core):
    planned = dry_run(interpreter(tmp_path, version)).stdout
    files = set(re.findall(r"-c (\S+)", planned))
    assert len(files) == 1, planned
    assert f"megatron-core=={core}\n" in (ROOT / files.pop()).read_text()


def test_constraints_of_ones_own_win(tmp_path):
    planned = dry_run(interpreter(tmp_path, "3.12"), "CONSTRAINTS=-c mine.txt").stdout
    assert set(re.findall(r"-c (\S+)", planned)) == {"mine.txt"}


@pytest.mark.parametrize("version", ["3.10", "3.14", ""])
def test_an_unsupported_interpreter_is_named_with_the_remedy(tmp_path, version):
    python = interpreter(tmp_path, version)
    done = subprocess.run(
        ["make", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}", "setup"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    state = f"is Python {version}" if version else "does not run"
    assert f"{python} {state}: install Python 3.11, 3.12 or 3.13" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_the_two_ends_differ_in_megatron_core_alone():
    """A fault that shows on one end only is then its fault."""
    files = [ROOT / "constraints" / name for name in ("py311-mcore016.txt", "py312-mcore019.txt")]
    old, new = ({line for line in file.read_text().splitlines() if not line.startswith("#")} for file in files)
    assert old ^ new == {"megatron-core==0.16.1", "megatron-core==0.19.2"}
