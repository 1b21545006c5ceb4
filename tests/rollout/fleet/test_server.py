"""A server's command line, key and exit, with the real vLLM; its folders, log and guard without it."""

import errno
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from waiting import until

import nft_megatron
from nft_megatron.rollout.fleet import guard
from nft_megatron.rollout.fleet import server as server_module
from nft_megatron.rollout.fleet.server import Server, ServerSettings
from nft_megatron.rollout.fleet.supervisor import Deadlines, ServerSupervisor, Target

PATIENCE = 120.0


@pytest.mark.timeout(1800)
def test_two_servers_answer_and_require_the_key(vllm_servers):
    for server in vllm_servers:
        assert httpx.get(f"{server.url}/v1/models", headers=server.headers).json()["data"][0]["id"] == "policy"
        for path in ("/health", "/v1/models", "/weight_info", "/metrics"):
            assert httpx.get(f"{server.url}{path}").status_code == 401
        stranger = {"Authorization": "Bearer x"}
        rpc = httpx.post(f"{server.url}/collective_rpc", json={"method": "reload_weights"}, headers=stranger)
        assert rpc.status_code == 401


@pytest.fixture
def asleep(tmp_path):
    """Settings for servers that only sleep."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 600\n")
    python.chmod(0o755)
    return ServerSettings(tmp_path / "model", tmp_path / "fleet", tmp_path / "logs", "key", python=str(python))


def test_each_location_of_the_package_has_its_own_folder(asleep, tmp_path, monkeypatch):
    places = [Path(nft_megatron.__file__).resolve().parent, tmp_path / "moved" / "nft_megatron"]
    for _ in range(2):
        for place in places:
            monkeypatch.setattr(server_module, "_PACKAGE", place)
            (link,) = Path(asleep.environment(None)["PYTHONPATH"]).iterdir()
            assert (link.name, link.readlink()) == ("nft_megatron", place)
    assert len(list((tmp_path / "fleet" / "python").iterdir())) == 2


def test_a_server_does_not_inherit_what_the_trainer_set_for_its_own_gpu(asleep, monkeypatch):
    monkeypatch.setenv("NFT_MEGATRON_EXPORTED", "CUDA_DEVICE_MAX_CONNECTIONS")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    environment = asleep.environment(None)
    assert environment["NCCL_SOCKET_IFNAME"] == "ib0"
    assert not {"NFT_MEGATRON_EXPORTED", "CUDA_DEVICE_MAX_CONNECTIONS"} & environment.keys()


def test_a_server_whose_log_is_gone_is_restarted(asleep):
    servers = []

    def launch():
        servers.append(Server(asleep, "local-0", seed=0))
        return servers[-1]

    supervisor = ServerSupervisor("local-0", Target(), Deadlines(60.0, 5.0, 0.2), "finish", 10, "key", launch=launch)
    try:
        until(lambda: servers and servers[0].log.exists())
        servers[0].log.unlink()
        os.killpg(servers[0].process.pid, signal.SIGKILL)
        until(lambda: len(servers) == 2 and servers[1].is_alive())
        servers[1].log.unlink()
        assert "No such file" in servers[1].log_tail()
    finally:
        supervisor.close(PATIENCE)
    assert not servers[1].is_alive()


def test_whoever_takes_the_port_of_a_starting_server_does_not_get_the_key(asleep):
    """vLLM binds its port half a minute after it was chosen: until then it is free to all users of the machine."""
    heard, servers, squatter = [], [], socket.socket()

    def launch():
        server = Server(asleep, "local-0", seed=0)
        squatter.bind(("127.0.0.1", int(server.url.rpartition(":")[2])))
        squatter.listen()
        servers.append(server)
        return server

    supervisor = ServerSupervisor("local-0", Target(), Deadlines(60.0, 5.0, 5.0), "finish", 10, "key", launch=launch)
    try:
        until(lambda: servers)
        for _ in range(2):
            connection, _ = squatter.accept()
            with connection:
                heard.append(connection.recv(1 << 16).decode())
                connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n{"weight_version": "1"}')
        until(lambda: "without proof that it is the server that was started" in supervisor.stats().reason)
        assert supervisor.stats().state == "starting"
    finally:
        supervisor.close(PATIENCE)
        squatter.close()
    assert len(servers) == 1 and all(request.startswith("GET /weight_info HTTP/1.1") for request in heard)
    assert not any("key" in request.split() or "Bearer" in request for request in heard)
    assert len({line for request in heard for line in request.splitlines() if line.startswith("Authorization: NFT ")}) == 2


def test_only_the_end_of_a_long_log_is_read(asleep):
    server = Server(asleep, "local-0", seed=0)
    try:
        with server.log.open("wb") as log:
            log.truncate(1 << 40)  # a hole: it would fill the memory
            log.seek(0, os.SEEK_END)
            log.write(b"\n" + b"\n".join(b"line %d" % number for number in range(100)))
        assert server.log_tail().splitlines() == [f"line {number}" for number in range(85, 100)]
    finally:
        server.stop(0)


def test_a_failed_start_leaves_no_open_descriptor(asleep, monkeypatch):
    def fails(*_, **__):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", fails)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="temporarily unavailable"):
        Server(asleep, "local-0", seed=0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_guard_watches_a_descriptor_above_1023():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 2048), hard), hard))
    ours, alive = os.pipe()
    try:
        high = fcntl.fcntl(ours, fcntl.F_DUPFD, 1024)
        process = subprocess.Popen(
            [sys.executable, guard.__file__, str(high), "sleep", "600"],
            pass_fds=(high,),
            start_new_session=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        os.close(high)
        until(lambda: any(Path(f"/proc/{child}/comm").read_text() == "sleep\n" for child in children(process.pid)))
        num_looks = pauses(process.pid)
        until(lambda: process.poll() is not None or pauses(process.pid) > num_looks + 3)  # it polls the pipe and stays alive
    finally:
        os.close(alive)
        os.close(ours)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert process.communicate(timeout=PATIENCE)[0] == "guard: the parent is gone\n"
    assert process.returncode == -signal.SIGKILL


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def pauses(pid):
    """How often a process has waited (voluntary context switches)."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("voluntary")]
    return int(line.split()[1])
