"""The way through NeMo-Run submits the same run to a real Slurm."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

RECIPE = Path(__file__).resolve().parents[2] / "slurm" / "nemo_run_recipe.py"
BESIDE = Path(sys.prefix) / "nemo-run" / "bin" / "python"  # where `make nemo-run` puts it
PYTHON = sys.executable if find_spec("nemo_run") else str(BESIDE)

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not Path(PYTHON).exists() or not find_spec("nemo_run") and not BESIDE.exists(), reason="make nemo-run"),
]


def recipe(run, *arguments, check=True) -> subprocess.CompletedProcess:
    return run.lab.run(PYTHON, RECIPE, run.config, *arguments, check=check, timeout=180)


def test_a_run_goes_to_its_end(slurm_run):
    run = slurm_run(slurm={"account": "us", "python": sys.executable}, train={"num_steps": 3})
    print(recipe(run))
    assert run.wait_end() == "finished"
    print(run.lab.job(run.job_id)); print(run.known())
    assert 0
