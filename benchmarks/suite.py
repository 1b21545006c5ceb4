"""How long the test suite takes, on an idle machine or beside busy processes, and what it covers.

    python benchmarks/suite.py [--tier test|rest] [--busy 2] [--coverage] [--tests PATH …]

Every run appends one line to results/suite_2_cores.jsonl as it ends: commit, tier, busy processes, the machine's load before it
began, cases passed, failed and skipped, seconds, CPU seconds of the processes that ended before it; with ``--coverage`` the
share of the package's lines and branches that the run reached, its subprocesses included.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "suite_2_cores.jsonl"
MARKS = {"test": "not slow", "rest": "slow"}
SETTINGS = """[run]
branch = true
parallel = true
source_pkgs = nft_megatron
data_file = {folder}/data
patch = subprocess, fork, _exit
sigterm = true
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=MARKS, default="test")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="busy processes beside it")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that run tests")
    parser.add_argument("--coverage", action="store_true")
    parser.add_argument("--tests", nargs="+", default=["tests"], metavar="PATH")
    options = parser.parse_args()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.busy)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            row = run(options, Path(folder))
    finally:
        for process in busy:
            process.kill()
    with RESULTS.open("a") as results:
        results.write(json.dumps(row) + "\n")
    print(json.dumps(row))


def run(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """One run of the suite."""
    pytest = [
        "pytest",
        "-n",
        str(options.workers),
        "--dist",
        "loadgroup",
        "--no-loadscope-reorder",
        "-q",
        "-m",
        MARKS[options.tier],
        *options.tests,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    coverage = [sys.executable, "-m", "coverage"]
    if options.coverage:
        settings = folder / "coveragerc"
        settings.write_text(SETTINGS.format(folder=folder))
        environment["COVERAGE_RCFILE"] = str(settings)
    command = [*coverage, "run", "-m", *pytest] if options.coverage else [sys.executable, "-m", *pytest]
    load, started = os.getloadavg()[0], time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    seconds, used = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    print(done.stdout[-4000:])
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout[-400:])}
    row: dict[str, object] = {
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
        "tests": options.tests,
        "tier": options.tier,
        "workers": options.workers,
        "busy": options.busy,
        "load_before": round(load, 2),
        "seconds": round(seconds),
        "cpu_seconds": round(used.ru_utime + used.ru_stime),
        **counts,
    }
    if options.coverage:
        for action in (["combine", "-q"], ["json", "-q", "-o", str(folder / "report.json")]):
            subprocess.run([*coverage, *action], cwd=ROOT, env=environment, check=True)
        totals = json.loads((folder / "report.json").read_text())["totals"]
        row |= {
            "lines": totals["covered_lines"] / totals["num_statements"],
            "branches": totals["covered_branches"] / totals["num_branches"],
        }
    return row


if __name__ == "__main__":
    main()
