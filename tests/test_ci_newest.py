"""`.ci/newest`, CI's second leg: it finds a Python that runs, keeps to its time, and fails only where tests fail."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "newest"
WORKS, SHIM = "#!/bin/sh\nexit 0\n", "#!/bin/sh\necho 'python3.12: command not found' >&2\nexit 127\n"


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def leg(tmp_path):
    """Runs the script in a folder of its own, with what is in ``tmp_path/bin`` first on the path; make notes its arguments."""
    script = program(tmp_path / "tree" / ".ci" / "newest", SCRIPT.read_text())
    program(tmp_path / "bin" / "python3.12", SHIM)
    program(tmp_path / "bin" / "df", "#!/bin/sh\necho Avail\necho 99999999\n")

    def run(make: str = "exit 0", seconds: int = 600) -> subprocess.CompletedProcess:
        program(tmp_path / "bin" / "make", f'#!/bin/sh\necho "$@" >{tmp_path}/made\n{make}\n')
        env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path / "home")}
        return subprocess.run([script, str(seconds)], env=env, capture_output=True, text=True)

    return run


@pytest.fixture
def pyenv(tmp_path) -> Path:
    return program(tmp_path / "home" / ".pyenv" / "versions" / "3.12.9" / "bin" / "python", WORKS)


def test_a_shim_that_does_not_run_is_passed_over(leg, pyenv, tmp_path):
    done = leg()
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "made").read_text().split()
    assert made[:2] == [f"PYTHON={pyenv}", "VENV=.venv-3.12"] and made[-2:] == ["engine", "test-megatron"]
    paths = [word.removeprefix("MEGATRON_TESTS=") for word in made[2:-2]]
    assert paths and all((SCRIPT.parents[1] / path).exists() for path in paths), paths


def test_without_a_python_nothing_is_made(leg, tmp_path):
    done = leg()
    assert done.returncode == 0 and "no Python 3.12 runs here" in done.stdout
    assert not (tmp_path / "made").exists()


def test_tests_that_fail_fail_it(leg, pyenv):
    assert leg("exit 2").returncode == 2


def test_what_the_time_does_not_suffice_for_is_not_judged(leg, pyenv, tmp_path):
    done = leg(seconds=30)
    assert done.returncode == 0 and "not tested, with 30 s left" in done.stdout
    assert not (tmp_path / "made").exists()
    program(tmp_path / "bin" / "timeout", "#!/bin/sh\nexit 124\n")  # what it says of a command that it ended
    done = leg()
    assert done.returncode == 0 and "not finished within 600 s" in done.stdout


def test_a_full_disk_is_left_alone(leg, pyenv, tmp_path):
    program(tmp_path / "bin" / "df", "#!/bin/sh\necho Avail\necho 9999999\n")
    done = leg()
    assert done.returncode == 0 and "9 of 15 GB of disk" in done.stdout
    assert not (tmp_path / "made").exists()
