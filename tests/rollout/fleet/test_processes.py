"""Processes of real vLLM servers that are killed, leave, or join late."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from waiting import until

from nft_megatron.config.load import load_config
from nft_megatron.rollout.fleet.registry import discover
from nft_megatron.rollout.fleet.server import Server
from nft_megatron.rollout.fleet.settings import open_fleet
from nft_megatron.weights.fingerprint import weights_fingerprint

pytestmark = [pytest.mark.xdist_group("vllm"), pytest.mark.timeout(600)]

PATIENCE = 240.0  # a start, on a busy machine


def living():
    """``(pid, name, parent, group)`` of every process on the machine."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, rest = path.read_text().rsplit(")", 1)
        except OSError:  # it has just ended
            continue
        state, parent, group = rest.split()[:3]
        if state != "Z":
            yield int(path.parent.name), head.partition("(")[2], int(parent), int(group)


def processes(server):
    """The living processes of a server by what they are; ``server`` is the id of their session."""
    kinds = {"VLLM::EngineCor": "engine", "VLLM::Worker": "worker"}
    return {
        "guard" if pid == group else kinds.get(name) or ("API" if parent == group else pid): pid
        for pid, name, parent, group in living()
        if group == server
    }


def servers_of(parent):
    """The sessions that a process has started."""
    return {pid for pid, _, its_parent, group in living() if its_parent == parent and pid == group}


def kill(group, kind):
    os.kill(processes(group)[kind], signal.SIGKILL)


@pytest.fixture
def weights(fleet_model):
    return load_file(fleet_model / "model.safetensors")


def test_nothing_is_left_of_a_server_that_is_killed_in_any_way_or_loses_its_parent(server_settings):
    """Three servers on their way up: the guard does its work from the first moment on."""
    code = (
        "import pickle, sys, time; from nft_megatron.rollout.fleet.server import Server;"
        "server = Server(pickle.load(sys.stdin.buffer), 'child', seed=0); print(server.process.pid, flush=True);"
        "time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    parent.stdin.write(pickle.dumps(server_settings))
    parent.stdin.close()
    orphan = int(parent.stdout.readline())
    servers = {kind: Server(server_settings, kind, seed=0) for kind in ("guard", "API")}
    groups = {kind: server.process.pid for kind, server in servers.items()} | {"parent": orphan}
    until(lambda: all("API" in processes(group) for group in groups.values()), PATIENCE)
    kill(groups["API"], "API")
    parent.kill()
    until(lambda: not processes(groups["API"]) and not processes(orphan))
    kill(groups["guard"], "guard")
    until(lambda: not servers["guard"].is_alive())
    for server in servers.values():
        server.stop(0)  # what a supervisor does that sees it gone
    until(lambda: not processes(groups["guard"]))
    parent.wait()


def test_killed_servers_come_back_with_the_current_weights_and_late_joiners_serve(
    server_settings, fleet_model, weights, tmp_path
):
    run = tmp_path / "run"
    config = {
        "run_dir": str(run),
        "seed": 3,
        "model": {"path": str(fleet_model), "dtype": "float32"},
        "data": {"train": "unused.parquet", "max_prompt_tokens": 100},
        "rollout": {"engine": "vllm", "max_answer_tokens": 100},
        "train": {"num_steps": 1},
        "fleet": {"silence_seconds": 5.0, "start_seconds": PATIENCE},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    node = subprocess.Popen([sys.executable, "-m", "nft_megatron", "serve", str(tmp_path / "config.yaml"), "--name", "node"])
    others = servers_of(os.getpid())  # of other tests
    fleet = open_fleet(load_config(tmp_path / "config.yaml", ["fleet.servers=1", f"fleet.wait_seconds={PATIENCE}"]))
    try:
        fingerprint = fleet.publish(weights.items(), 1)
        assert fingerprint == weights_fingerprint(weights.items())
        until(lambda: {member.name for member in fleet.serving()} == {"local-0", "node"}, PATIENCE)
        incarnations = {member.name: member.incarnation for member in fleet.serving()}
        urls = {member.name: member.url for member in fleet.serving()}

        (local,), (remote,) = servers_of(os.getpid()) - others, servers_of(node.pid)
        assert processes(local).keys() >= {"guard", "API", "engine", "worker"} <= processes(remote).keys()
        kill(local, "engine")
        kill(remote, "worker")
        until(lambda: not processes(local) and not processes(remote))
        until(lambda: fleet.serving() == [])
        until(lambda: {member.name for member in fleet.serving()} == {"local-0", "node"}, PATIENCE)
        members = {member.name: member for member in fleet.serving()}
        assert members["local-0"].incarnation == incarnations["local-0"] + 1
        assert members["node"].url != urls["node"]
        assert {member.health.fingerprint for member in members.values()} == {fingerprint}

        node.terminate()
        until(lambda: discover(run / "fleet") == {})
        until(lambda: {member.name for member in fleet.serving()} == {"local-0"})
        assert node.wait(PATIENCE) == 0
        (last,) = servers_of(os.getpid()) - others
    finally:
        node.kill()
        fleet.close()
    until(lambda: not processes(last))
