"""Four ranks save and load: equal parts, each byte read once, restored to the bit. Memory is measured with larger ones."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "checkpoint_parallel.py"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of a process from /proc")
def test_each_rank_writes_a_quarter_and_reads_it_once() -> None:
    command = [sys.executable, "-W", "ignore", str(BENCHMARK), "--layers", "2", "--hidden", "256", "--vocabulary", "8192"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "restored to the bit on every rank" in done.stdout
    shares = [float(line.split("|")[3]) for line in done.stdout.splitlines() if re.match(r"\|\s+\d", line)]
    assert shares == pytest.approx([1, 1, 1, 1], rel=0.02)
    read = re.search(r"all ranks read ([\d.]+) times the files", done.stdout)
    assert read is not None
    assert 1 <= float(read[1]) < 1.02  # the index is read by each
