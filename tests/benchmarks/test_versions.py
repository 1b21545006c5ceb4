"""The table of suites by versions: what a run of pytest is counted as, and that the docs show what was run."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import versions  # noqa: E402

CASES = """
import pytest
def test_passes(): pass
def test_fails(): assert False
@pytest.fixture
def broken(): raise OSError
def test_errs(broken): pass
@pytest.mark.skip
def test_is_skipped(): pass
@pytest.mark.slow
def test_is_left_out(): assert False
"""


def environment(folder: Path, python: str, core: str) -> Path:
    """One whose Python reports these versions."""
    program = folder / "bin" / "python"
    program.parent.mkdir()
    program.write_text(f"""#!/bin/sh\necho '{{"python": "{python}", "megatron-core": "{core}", "torch": "2.13.0"}}'\n""")
    program.chmod(0o755)
    return folder


def test_the_docs_show_the_newest_runs():
    table = versions.table(versions.rows())
    assert table in (ROOT / "docs" / "architecture.md").read_text(), f"docs/architecture.md, Versions, should have:\n{table}"


def test_outcomes_are_those_of_pytest(tmp_path):
    (tmp_path / "test_cases.py").write_text(CASES)
    row = versions.run(Path(sys.executable), str(tmp_path / "test_cases.py"), ["-p", "no:cacheprovider"])
    assert (row["passed"], row["failed"], row["skipped"]) == (1, 2, 1)
    assert row["failures"] == ["test_fails", "test_errs"]


def test_a_pytest_that_dies_is_a_failure(tmp_path):
    (tmp_path / "test_dies.py").write_text("import os\nos._exit(7)\n")
    row = versions.run(Path(sys.executable), str(tmp_path / "test_dies.py"), ["-p", "no:cacheprovider"])
    assert (row["passed"], row["failed"], row["failures"]) == (0, 1, ["pytest ended with 7"])


def test_an_environment_must_be_what_it_is_called(tmp_path):
    folder = environment(tmp_path, "3.12.4", "0.19.2")
    _, found = versions.checked(f"3.12+0.19.2={folder}")
    assert found["python"] == "3.12.4"
    with pytest.raises(SystemExit, match=r"this is 3\.12\+0\.19\.2; write 3\.12\+0\.19\.2="):
        versions.checked(f"3.11+0.16.1={folder}")
    with pytest.raises(SystemExit, match="does not exist"):
        versions.checked(f"3.12+0.19.2={tmp_path / 'nowhere'}")
