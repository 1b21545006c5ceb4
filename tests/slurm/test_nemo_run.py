"""The way through NeMo-Run submits the same run to a real Slurm."""

import doctest
import re
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from nft_megatron.config.load import load_config
from nft_megatron.slurm.render import job_name

RECIPE = Path(__file__).resolve().parents[2] / "slurm" / "nemo_run_recipe.py"
BESIDE = Path(sys.prefix) / "nemo-run" / "bin" / "python"  # of `make nemo-run`
PYTHON = sys.executable if find_spec("nemo_run") else str(BESIDE)

pytestmark = pytest.mark.timeout(600)
needs_nemo_run = pytest.mark.skipif(
    find_spec("nemo_run") is None and not BESIDE.exists(), reason="no nemo_run: make nemo-run, or pip install '.[slurm]'"
)


def recipe():
    """The recipe as a module."""
    spec = spec_from_file_location("nemo_run_recipe", RECIPE)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_examples_hold():
    assert doctest.testmod(recipe()) == (0, 1)


@pytest.mark.slow
@needs_nemo_run
def test_a_run_is_requeued_and_continues(slurm_run):
    settings = {"account": "us", "python": sys.executable, "sbatch": ["--comment=ours"], "signal_seconds": 120}
    run = slurm_run(slurm=settings, train={"num_steps": 10_000})
    assert "submitted job" in run.lab.run(PYTHON, RECIPE, run.config, timeout=240).stdout
    job, name_of_job = run.lab.job(run.job_id), job_name(load_config(run.config))
    assert {name: job[name] for name in ("JobName", "Account", "Comment", "NumNodes", "TimeLimit", "Requeue")} == {
        "JobName": name_of_job,
        "Account": "us",
        "Comment": "ours",
        "NumNodes": "2",
        "TimeLimit": "00:30:00",
        "Requeue": "1",
    }
    run.wait_step(2)
    run.lab.run("scancel", "--signal=USR1", run.job_id)
    run.wait(lambda: len(run.attempts) == 2, "no second attempt")
    assert run.attempts[0].kind == "left"
    first_log = (run.root / f"slurm/log-{name_of_job}_{run.job_id}_0.out").read_text()
    assert first_log.startswith("WARNING: attempt 1 on n1 n2\n"), first_log
    run.wait_step(len(run.rows()) + 1)
    run.command("stop", run.root)
    assert run.wait_end() == "stopped"
    job = run.lab.wait_state(run.job_id, ("COMPLETED", "FAILED"))
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert [row["step"] for row in run.rows()] == list(range(1, len(run.rows()) + 1))


@needs_nemo_run
@pytest.mark.slow
def test_a_dry_run_prints_the_script_and_submits_nothing(slurm_run):
    run = slurm_run(slurm={"account": "us", "python": sys.executable, "setup": ["module load cuda"]})
    printed = run.lab.run(PYTHON, RECIPE, run.config, "slurm.time=2:00:00", "--dry-run", timeout=240).stdout
    for line in ("#SBATCH --time=2:00:00", "#SBATCH --signal=USR1@600", "#SBATCH --dependency=singleton", "module load cuda"):
        assert re.search(rf"^\s*{re.escape(line)}\s*$", printed, re.MULTILINE), line
    assert run.lab.run("squeue", "-h").stdout == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("slurm.account=null", "slurm.account = None: is required by NeMo-Run"),
        ("run_dir=/shared/nemo_runs/a", "run_dir = /shared/nemo_runs/a: contains /nemo_run"),
        ("slurm.restart=chain", "slurm.restart = chain: is not supported with NeMo-Run"),
        ('slurm.sbatch=["-q high"]', "slurm.sbatch = -q high: is not of the form --option=value"),
        ('slurm.sbatch=["--comment=a --uid=0"]', "slurm.sbatch = --comment=a --uid=0: NeMo-Run writes it unquoted"),
        ("slurm.account='a --uid=root'", "slurm.account = a --uid=root: NeMo-Run writes it unquoted"),
        ("slurm.partition='a\"'", 'slurm.partition = a": NeMo-Run writes it unquoted'),
        ("slurm.gres='gpu:1 #'", "slurm.gres = gpu:1 #: NeMo-Run writes it unquoted"),
        ("slurm.sbatch=--uid=0", "slurm.sbatch = --uid=0: would run the job as another user"),
    ],
)
def test_what_it_has_no_way_for_is_refused_before_anything_is_written(
    run_config, tmp_path, monkeypatch, capsys, override, message
):
    monkeypatch.setattr("sys.argv", [str(RECIPE), str(run_config(slurm={"account": "us"})), override])
    with pytest.raises(SystemExit) as end:
        recipe().main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
