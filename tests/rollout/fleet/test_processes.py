"""Processes of real vLLM servers that are killed, leave, or join late."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from safetensors.torch import load_file
from waiting import until

from nft_megatron.config.fleet import FleetConfig
from nft_megatron.config.load import load_config
from nft_megatron.rollout.fleet.fleet import Fleet
from nft_megatron.rollout.fleet.registry import discover
from nft_megatron.rollout.fleet.server import Server
from nft_megatron.rollout.fleet.settings import open_fleet
from nft_megatron.weights.fingerprint import weights_fingerprint

pytestmark = [pytest.mark.xdist_group("vllm"), pytest.mark.timeout(1800)]

PATIENCE = 600.0  # for a start on a busy machine


def living():
    """``(pid, name, parent, group)`` of every process on the machine."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, rest = path.read_text().rsplit(")", 1)
        except OSError:  # it has just exited
            continue
        state, parent, group = rest.split()[:3]
        if state != "Z":
            yield int(path.parent.name), head.partition("(")[2], int(parent), int(group)


def processes(server):
    """A server's living processes by role; ``server`` is the id of their session."""
    kinds = {"VLLM::EngineCor": "engine", "VLLM::Worker": "worker"}
    return {
        "guard" if pid == group else kinds.get(name) or ("API" if parent == group else pid): pid
        for pid, name, parent, group in living()
        if group == server
    }


def servers_of(parent):
    """The sessions started by a process."""
    return {pid for pid, _, its_parent, group in living() if its_parent == parent and pid == group}


def kill(group, kind):
    os.kill(processes(group)[kind], signal.SIGKILL)


@pytest.fixture
def weights(fleet_model):
    return load_file(fleet_model / "model.safetensors")


def test_nothing_is_left_of_a_server_that_is_killed_or_loses_its_parent(server_settings):
    """Three servers that are still starting: the guard works from the first moment."""
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
        server.stop(0)  # as a supervisor does when it finds it gone
    until(lambda: not processes(groups["guard"]))
    parent.wait()


class Adopting(Fleet):
    """Its first server is one that is already running."""

    def __init__(self, adopted, *arguments):
        super().__init__(*arguments)
        self.launched = [adopted]

    def _launcher(self, index):
        launch, first = super()._launcher(index), iter(self.launched[:1])

        def next_server():
            if (server := next(first, None)) is None:
                self.launched.append(server := launch())
            return server

        return next_server


@pytest.mark.slow
def test_a_killed_server_comes_back_with_the_current_weights(vllm_servers, server_settings, weights, tmp_path):
    """Its successor takes its place among the servers of other tests."""
    config = FleetConfig(servers=1, silence_seconds=60.0, start_seconds=PATIENCE, wait_seconds=PATIENCE)
    fleet = Adopting(vllm_servers[0], config, server_settings, tmp_path / "weights")
    fleet.start()
    try:
        assert fleet.publish(weights.items(), 1) == weights_fingerprint(weights.items())
        (member,) = fleet.serving()
        killed = vllm_servers[0].process.pid
        assert processes(killed).keys() >= {"guard", "API", "engine"}
        kill(killed, "engine")
        until(lambda: len(fleet.launched) == 2, PATIENCE)
        assert not processes(killed)
        vllm_servers[0] = fleet.launched[1]
        until(lambda: fleet.serving(), PATIENCE)
        (successor,) = fleet.serving()
        assert (successor.incarnation, successor.url) == (member.incarnation + 1, vllm_servers[0].url) != (None, member.url)
        assert successor.health.fingerprint == member.health.fingerprint == weights_fingerprint(weights.items())
    finally:
        fleet.launched[-1].stop = lambda seconds=0.0: None  # it must outlive this fleet
        fleet.close()
        del fleet.launched[-1].stop
    label = {"new_version": "default"}
    server = vllm_servers[0]
    httpx.post(f"{server.url}/update_weight_version", json=label, headers=server.headers, timeout=60).raise_for_status()


@pytest.mark.slow
def test_a_node_joins_late_comes_back_with_the_current_weights_and_leaves(
    vllm_servers, server_settings, fleet_model, weights, tmp_path
):
    run = tmp_path / "run"
    (tmp_path / "key").write_text(server_settings.api_key)
    config = {
        "run_dir": str(run),
        "seed": 3,
        "model": {"path": str(fleet_model), "dtype": "float32"},
        "data": {"train": "unused.parquet", "max_prompt_tokens": 100},
        "rollout": {"engine": "vllm", "max_answer_tokens": 100},
        "train": {"num_steps": 1},
        "fleet": {"silence_seconds": 60.0, "start_seconds": PATIENCE, "wait_seconds": PATIENCE},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    of_others = [f"fleet.urls=[{vllm_servers[0].url}]", f"fleet.key_file={tmp_path / 'key'}"]
    fleet = open_fleet(load_config(tmp_path / "config.yaml", of_others))
    node = subprocess.Popen([sys.executable, "-m", "nft_megatron", "serve", str(tmp_path / "config.yaml"), "--name", "node"])
    try:
        fingerprint = fleet.publish(weights.items(), 1)
        until(lambda: names(fleet) == {"url-0", "node"}, PATIENCE)
        url = next(member.url for member in fleet.serving() if member.name == "node")
        (remote,) = servers_of(node.pid)
        assert processes(remote).keys() >= {"guard", "API", "worker"}
        kill(remote, "worker")
        until(lambda: not processes(remote))
        until(lambda: any(member.name == "node" and member.url != url for member in fleet.serving()), PATIENCE)
        assert {member.health.fingerprint for member in fleet.serving()} == {fingerprint}

        node.terminate()
        until(lambda: discover(run / "fleet") == {})
        until(lambda: names(fleet) == {"url-0"})
        assert node.wait(PATIENCE) == 0
    finally:
        node.kill()
        fleet.close()
    server = vllm_servers[0]
    label = {"new_version": "default"}
    httpx.post(f"{server.url}/update_weight_version", json=label, headers=server.headers, timeout=60).raise_for_status()


def names(fleet):
    return {member.name for member in fleet.serving()}
