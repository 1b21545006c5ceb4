"""The cluster that other tests rely on does what a Slurm does, also when a node loses its power."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import until

TESTS = Path(__file__).resolve().parents[1]


def wait_for(path: Path) -> str:
    """What a job wrote, as soon as it has."""
    until(lambda: path.exists() and path.read_text().endswith("\n"))
    return path.read_text()


def test_a_job_runs_on_the_node_asked_for(lab, tmp_path):
    out = tmp_path / "out"
    job = lab.submit(
        "--nodelist=n3", "--gres=gpu:h100:8", "--mem=0", f"--wrap=echo $SLURMD_NODENAME $SLURM_GPUS_ON_NODE >{out}"
    )
    state = lab.wait_state(job, "COMPLETED")
    assert (state["NodeList"], state["ExitCode"]) == ("n3", "0:0")
    assert out.read_text() == "n3 8\n"


def test_steps_of_a_job_are_on_all_its_nodes(lab, tmp_path):
    job = lab.submit("--nodes=4", "--output", tmp_path / "out", "--wrap=srun -l printenv SLURMD_NODENAME SLURM_PROCID")
    lab.wait_state(job, "COMPLETED")
    lines = sorted((tmp_path / "out").read_text().split("\n"))
    assert [line for line in lines if "n" in line] == [f"{i}: n{i + 1}" for i in range(4)]


def test_a_signal_to_the_batch_script_arrives(lab, tmp_path):
    ready, out = tmp_path / "ready", tmp_path / "out"
    job = lab.submit(f"--wrap=trap 'echo USR1 >{out}; exit' USR1; echo >{ready}; while :; do sleep .1; done")
    wait_for(ready)
    lab.run("scancel", "--signal=USR1", "--batch", job)
    assert wait_for(out) == "USR1\n"
    lab.wait_state(job, "COMPLETED")


def test_the_power_of_a_node_is_lost_and_comes_back(lab, tmp_path):
    script = f"echo $SLURM_RESTART_COUNT $SLURMD_NODENAME $$ >>{tmp_path}/starts; srun --nodes=1 sleep 300"
    job = lab.submit("--nodes=2", "--nodelist=n1,n2", "--requeue", f"--wrap={script}")
    lab.wait_state(job, "RUNNING")
    (_, pid) = wait_for(tmp_path / "starts").split()[-2:]
    lab.kill_node("n1")
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    lab.run("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=power")
    # The nodes were asked for by name, so it has to wait for n1.
    assert lab.wait_state(job, "PENDING")["Restarts"] == "1"
    assert lab.node("n1")["State"].startswith("DOWN")
    lab.restore_node("n1")
    lab.wait_state(job, "RUNNING")


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_two_clusters_stand_beside_each_other_and_nothing_outlives_the_process_that_began_one(lab, signal_number):
    code = """
from slurm.lab import Lab
lab = Lab(1).__enter__()
assert lab.nodes == ['n1']
lab.wait_state(lab.submit('--wrap=true'), 'COMPLETED')
lab.wait_state(lab.submit('--wrap=setsid sleep 300'), 'RUNNING')
print(lab.folder, flush=True)
input()"""
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as owner:
        folder = owner.stdout.readline().strip()
        assert lab.run("squeue", "-h").stdout == "" and lab.nodes == ["n1", "n2", "n3", "n4"]
        owner.send_signal(signal_number)
    until(lambda: not Path(folder).exists())
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            assert folder not in environment.read_text(errors="replace"), environment
        except OSError:
            continue  # ended
