"""Servers on other nodes of the cluster, with real vLLM: in the run's own job, and in one that joins it."""

import importlib.util
import os
import signal
import sys

import pytest
from conftest import WIDE, make_model
from slurm.lab import variable
from slurm.runs import processes, words_of

from nft_megatron.data.ledger import read_groups
from nft_megatron.observe.metrics import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="run `make vllm`"),
]
FLEET = {"wait_seconds": 600.0, "silence_seconds": 5.0, "python": sys.executable}


def fleet_run(slurm_run, tmp_path, **cluster):
    model = make_model(tmp_path / "model", **WIDE)
    return slurm_run(
        model={"path": str(model)},
        cluster={"trainer_nodes": 1, "gpus_per_node": 1, **cluster},
        fleet=FLEET,
        rollout={"engine": "vllm", "oversample": 4.0},
        train={"num_steps": 10_000},
        optimizer={"learning_rate": 1.0e-6},  # so that answers stay mixed
        checkpoint={"every": 1},
        evaluate={"data": []},
    )


def servers_on(run, node):
    """Process ids of what `serve` and vLLM are on ``node``."""
    of_node = [process for process in processes() if variable(process, "SLURMD_NODENAME") == node]
    return [process for process in of_node if any(b"vllm" in word for word in words_of(process))]


def check_ledgers(run):
    """Every group is there once, whole, of the version before its step."""
    groups = [
        (int(path.stem.removeprefix("step_")), group)
        for path in sorted(run.folder.run.ledgers.glob("step_*.parquet"))
        for group, fate in read_groups(path)
        if fate == "train"
    ]
    assert len({group.group_id for _, group in groups}) == len(groups) > 0
    for step, group in groups:
        assert len(group.answers) == 8
        assert {answer.completion.weight_version for answer in group.answers} == {step - 1}


def test_servers_of_the_job_come_back_and_guests_come_and_go(slurm_run, tmp_path):
    run = fleet_run(slurm_run, tmp_path, rollout_nodes=1)
    run.submit()
    run.wait_step(2)
    trainer_node, rollout_node = run.attempts[-1].nodes
    assert not servers_on(run, trainer_node)

    run.command("rollouts", run.root, "--add", "1")  # a node more
    run.wait(lambda: read_metrics(run.root)[-1].get("fleet/healthy") == 2, "the guest does not serve")
    for process in servers_on(run, rollout_node):
        os.kill(process, signal.SIGKILL)
    done = len(run.rows())
    run.wait_step(done + 3)  # with the guest alone
    run.wait(lambda: read_metrics(run.root)[-1].get("fleet/healthy") == 2, "the killed server does not come back")

    guest = next(node for node in run.lab.nodes if node not in run.attempts[-1].nodes and servers_on(run, node))
    run.lab.kill_node(guest)
    run.lab.run("scontrol", "update", f"NodeName={guest}", "State=DOWN", "Reason=power")
    done = len(run.rows())
    run.wait_step(done + 3)
    assert len(run.attempts) == 1, "the trainers were not touched"
    run.command("stop", run.root)
    assert run.wait_end() == "stopped"
    run.wait(lambda: not run.lab.run("squeue", "-h", "-t", "R").stdout, "the guest's job does not end with the run")
    check_ledgers(run)
