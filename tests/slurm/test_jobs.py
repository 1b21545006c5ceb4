"""Jobs on a real Slurm: what is submitted, what is refused, what ends a run for good, and what people ask meanwhile."""

import contextlib
import json
import os
import re
import sys
from pathlib import Path

import pytest
from slurm.lab import Lab

from nft_megatron.cli.main import main

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(900)


@contextlib.contextmanager
def busy(lab):
    """All nodes taken by somebody else, so that what is submitted has to wait."""
    other = lab.submit(f"--nodes={len(lab.nodes)}", "--exclusive", "--output=/dev/null", "--wrap=sleep 3600")
    lab.wait_state(other, "RUNNING")
    yield
    lab.run("scancel", other)


@pytest.mark.slow
def test_a_bad_node_is_excluded_and_the_job_requeued_without_it(slurm_run):
    """And what cannot be planned runs without a plan."""
    check = "test $SLURMD_NODENAME != n1 || { echo a fan is broken; false; }"
    run = slurm_run(train={"num_steps": 1}, slurm={"preflight": True, "preflight_seconds": 300.0, "preflight_command": check})
    run.submit("cluster.gpu=abacus", "slurm.plan=false")
    assert run.wait_end() == "finished"
    assert run.folder.excluded() == {"n1": "n1: slurm.preflight_command exited with 1: a fan is broken"}
    first, last = run.attempts
    assert (first.kind, first.nodes, first.blamed) == ("bad nodes", ("n1", "n2"), ("n1",))
    assert "n1" not in last.nodes
    assert last.kind == "finished"


def test_a_wrong_input_ends_the_run_at_once(slurm_run):
    run = slurm_run()
    with busy(run.lab):
        run.submit()
        config = run.folder.config
        config.write_text(config.read_text().replace("learning_rate", "learning_rat"))
    job = run.lab.wait_state(run.job_id, "FAILED")
    assert (job["ExitCode"], job["Restarts"]) == ("2:0", "0")
    assert "optimizer.learning_rat" in next(run.root.glob("slurm/job_*.log")).read_text()


@pytest.mark.slow
def test_a_wrong_input_that_only_the_trainers_find_is_fatal(slurm_run):
    run = slurm_run()
    with busy(run.lab):
        run.submit()
        text = run.folder.config.read_text()
        run.folder.config.write_text(text.replace("max_prompt_tokens: 8", "max_prompt_tokens: 2"))
    assert run.wait_end() == "fatal"
    job = run.lab.wait_state(run.job_id, "FAILED")
    assert (job["ExitCode"], job["Restarts"]) == ("2:0", "0")
    assert [attempt.kind for attempt in run.attempts] == ["wrong"]
    assert "data.max_prompt_tokens" in run.folder.end()[1]


@pytest.mark.slow
def test_a_crash_loop_is_given_up_with_its_cause(slurm_run):
    run = slurm_run(deadlines={"setup_seconds": 0.01}, slurm={"max_failures": 2})
    run.submit()
    assert run.wait_end() == "fatal"
    job = run.lab.wait_state(run.job_id, "FAILED")
    assert job["Restarts"] == "1"
    assert re.match(r"2 attempts in a row made no progress; the last one: .*phase setup", run.folder.end()[1])
    assert [attempt.kind for attempt in run.attempts] == ["failed", "failed"]
    assert (run.folder.logs(1) / "stall_rank0.txt").exists()


def test_what_people_ask_of_a_running_job(slurm_run):
    run = slurm_run(train={"num_steps": 10_000}, checkpoint={"every": 10_000})
    run.submit()
    run.wait_step(1)
    status = json.loads(run.command("status", run.root, "--json").stdout)
    assert status["job"]["JobState"] == "RUNNING"
    assert status["step"] >= 1
    shown = run.command("status", run.config).stdout
    assert re.search(rf"job +{run.job_id} RUNNING", shown)
    assert re.search(r"step +\d+ of 10000", shown)
    assert "step 1" in run.command("logs", run.root, "-n", "500").stdout
    assert "n2" in run.command("attach", "--node=n2", run.root, "--", "printenv", "SLURMD_NODENAME").stdout
    assert "is active on it" in run.command("submit", run.config, check=False).stderr

    assert run.folder.run.latest_step() is None
    run.command("checkpoint", run.root)
    run.wait(run.folder.run.latest_step, "no checkpoint")
    run.wait(lambda: not run.folder.run.save_request.exists(), "the request stays")
    assert run.attempts[-1].kind is None

    run.command("stop", run.root)
    assert run.wait_end() == "stopped"
    job = run.lab.wait_state(run.job_id, "COMPLETED")
    assert job["Restarts"] == "0"
    assert run.folder.run.latest_step() == len(run.rows())
    assert "stopped" in run.command("status", run.root).stdout
    assert "has no job to stop" in run.command("stop", run.root, check=False).stderr


def test_a_job_that_waits_is_taken_out_of_the_queue(slurm_run):
    run = slurm_run(slurm={"restart": "chain", "chain_jobs": 3})
    with busy(run.lab):
        run.submit()
        assert len(json.loads(run.command("status", run.root, "--json").stdout)["waiting"]) == 2
        run.command("stop", run.root)
        assert run.wait_end() == "stopped"
        assert len(run.lab.run("squeue", "-h").stdout.splitlines()) == 1


@pytest.mark.slow
def test_a_rendered_script_may_be_given_to_sbatch_by_hand(slurm_run):
    run = slurm_run()
    script = run.command("render", run.config, "train.num_steps=2").stdout
    run.folder.root.mkdir(parents=True)
    run.folder.script.write_text(script)
    run.lab.submit(run.folder.script)
    assert run.wait_end() == "finished"
    assert [row["step"] for row in run.rows()] == [1, 2]


@pytest.mark.slow
def test_a_chain_continues_where_requeueing_is_forbidden(slurm_run):
    run = slurm_run(train={"num_steps": 10_000}, slurm={"restart": "chain", "chain_jobs": 2})
    first = run.submit()
    run.wait_step(2)
    run.lab.run("scancel", "--signal=USR1", "--batch", first)
    run.wait(lambda: run.job_id != first and run.attempts[-1].number == 2, "the next job of the chain does not begin")
    assert run.attempts[0].kind == "left"
    assert run.lab.job(first)["Restarts"] == "0"
    done = len(run.rows())
    run.wait_step(done + 1)
    run.command("stop", run.root)
    assert run.wait_end() == "stopped"


@pytest.mark.slow
def test_the_time_limit_is_survived(slurm_run):
    run = slurm_run(train={"num_steps": 10_000}, slurm={"time": "2", "signal_seconds": 30}, deadlines={"leave_seconds": 5.0})
    run.submit()
    run.wait(lambda: len(run.attempts) == 2, "no second attempt")
    first = run.attempts[0]
    assert first.kind == "short" and re.search("time limit is near|the end of its time", first.cause), first
    done = first.progress[0]
    run.wait_step(done + 1)
    assert run.lab.job(run.job_id)["Restarts"] == "1"
    run.command("stop", run.root)
    run.wait_end()


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["data.train=/nowhere.parquet"], r"data.train = /nowhere.parquet: no such file"),
        (["slurm.partition=nothing"], r"slurm = .*invalid partition"),
        (["slurm.time=soon"], r"slurm.time = soon: is not a time limit"),
        (["cluster.rollout_nodes=1"], r"rollout.engine = embedded: uses no servers"),
        (["cluster.gpu=abacus"], r"cluster.gpu = abacus: .*slurm.plan=false"),
        (["cluster.trainer_nodes=5"], r"slurm = .*(unavailable|not available|invalid)"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_submitted(slurm_run, monkeypatch, capsys, overrides, complaint):
    """In this process, which is not to end with the command: six times nothing has to be imported."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    run = slurm_run()
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, run.lab.env[name])
    with pytest.raises(SystemExit) as end:
        main(["slurm", "submit", str(run.config), *overrides])
    assert end.value.code == 2
    assert re.search(complaint, capsys.readouterr().err, re.IGNORECASE | re.DOTALL)
    assert run.lab.run("squeue", "-h").stdout == ""


def test_the_32b_job_is_read_without_complaint(slurm_installed, tmp_path):
    with Lab(32) as lab:
        for nodes in (8, 16):
            config = ROOT / "examples/qwen2.5-32b-16k/config.yaml"
            both = [f"cluster.trainer_nodes={nodes}", f"cluster.rollout_nodes={nodes}", f"run_dir={tmp_path}"]
            script = lab.run(sys.executable, "-m", "nft_megatron", "slurm", "render", config, *both).stdout
            assert f"#SBATCH --nodes={2 * nodes}\n" in script
            (tmp_path / "job.sh").write_text(script)
            answer = lab.run("sbatch", "--test-only", tmp_path / "job.sh")
            assert re.search(rf"to start at .* using {2 * nodes * 128} processors on nodes", answer.stderr), answer.stderr
