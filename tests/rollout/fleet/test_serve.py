"""A rollout node's process: how it handles a busy server, a full disk and a server that does not start."""

import argparse
import errno
import threading
import time

import pytest
from fake_control import FakeServer
from waiting import until

from nft_megatron.base.backoff import Backoff
from nft_megatron.base.errors import UserError
from nft_megatron.config.load import load_config
from nft_megatron.rollout.fleet import serve
from nft_megatron.rollout.fleet.registry import discover

PATIENCE = 120.0


class Server:
    """Replaces the node's server: serves ``fake`` and lists what happens in ``events``."""

    fake, events, fails = None, [], 0

    def __init__(self, settings, name, seed, devices):
        self.events.append("start")
        if self.events.count("start") <= self.fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.url, self.api_key, self.server_id, self.log = self.fake.url, self.fake.key, self.fake.server_id, "log"

    def is_alive(self):
        return True

    def log_tail(self):
        return "the end"

    def stop(self):
        self.events.append("stop")


@pytest.fixture
def server(monkeypatch):
    fake = FakeServer(server_id="5a")
    for name, value in {"fake": fake, "events": [], "fails": 0}.items():
        monkeypatch.setattr(Server, name, value)
    monkeypatch.setattr(serve, "Server", Server)
    monkeypatch.setattr(serve, "_CHECK_SECONDS", 0.02)
    monkeypatch.setattr(serve, "Backoff", lambda: Backoff(first=0.02))
    yield Server
    fake.speak()
    fake.close()


@pytest.fixture
def start_node(run_config, server):
    """Runs a node on a thread; returns it and its registrations."""
    nodes = []

    def start(**fleet):
        config = load_config(run_config(rollout={"engine": "vllm"}, fleet={"silence_seconds": PATIENCE, **fleet}), [])
        node = serve.Node(config, "node", None)
        nodes.append((node, threading.Thread(target=node.run)))
        nodes[-1][1].start()
        return node, lambda: discover(config.run_dir / "fleet")

    yield start
    for node, thread in nodes:
        node.leave()
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_a_server_that_is_silent_while_loading_weights_stays(server, start_node):
    _, registered = start_node(silence_seconds=0.2, sync_seconds=PATIENCE)
    until(registered)
    server.fake.silent = {"/weight_info"}
    num_asked = server.fake.num_waiting
    until(lambda: server.fake.num_waiting > num_asked + 3)  # it was checked repeatedly
    heartbeat = registered()["node"].heartbeat  # it is not forgotten in the meantime
    until(lambda: registered()["node"].heartbeat > heartbeat)
    server.fake.speak()
    heartbeat = registered()["node"].heartbeat
    until(lambda: registered()["node"].heartbeat > heartbeat)
    assert server.events == ["start"]


@pytest.mark.parametrize("fault", ["silent", "refuses"])
def test_a_server_that_is_silent_for_longer_or_refuses_is_restarted(server, start_node, fault):
    settings = {"silence_seconds": 0.2, "sync_seconds": 1.0} if fault == "silent" else {}
    _, registered = start_node(**settings)
    until(registered)
    began = time.monotonic()
    if fault == "silent":
        server.fake.silent = {"/weight_info"}
    else:
        server.fake.status["/weight_info"] = 500
    until(lambda: len(server.events) >= 3)
    assert fault != "silent" or time.monotonic() - began > 0.9
    assert server.events[:3] == ["start", "stop", "start"] and not registered()
    server.fake.speak()
    server.fake.status.clear()
    until(registered)


def test_a_failing_disk_ends_no_healthy_server(server, start_node, monkeypatch, caplog):
    node, registered = start_node()
    until(registered)

    def fails(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(serve, "register", fails)
        until(lambda: caplog.text.count("could not renew its registration") > 3)
    heartbeat = registered()["node"].heartbeat
    until(lambda: registered()["node"].heartbeat > heartbeat)
    assert server.events == ["start"]
    monkeypatch.setattr(serve, "withdraw", fails)
    node.leave()
    until(lambda: server.events == ["start", "stop"])


def test_a_failed_start_and_an_odd_reply_are_logged_and_retried(server, start_node, monkeypatch, caplog):
    server.fails = 2
    _, registered = start_node()
    until(registered)
    assert server.events == ["start"] * 3 and caplog.text.count("this attempt failed") == 2 and "No space left" in caplog.text
    act = server.fake.act
    monkeypatch.setattr(server.fake, "act", lambda name, body: {})
    until(lambda: "missing required field `weight_version`" in caplog.text and not registered())
    monkeypatch.setattr(server.fake, "act", act)
    until(registered)


def test_a_node_says_by_what_its_server_proves_itself(server, start_node):
    _, registered = start_node()
    until(registered)
    assert registered()["node"].server_id == "5a"
    assert server.fake.authorizations and all(words.startswith("NFT ") for words in server.fake.authorizations)


@pytest.mark.parametrize("name", ["local-0", "url-7", "", "a/b", "../x", "a\nb", "a b", "x" * 201])
def test_a_name_that_a_server_cannot_have_is_refused(name):
    with pytest.raises(UserError, match=r"--name = .*is no name for a server; use letters"):
        serve.run(argparse.Namespace(name=name))


def test_a_leaving_node_withdraws_before_its_server_ends(server, start_node, monkeypatch):
    node, registered = start_node()
    until(registered)
    withdraw = serve.withdraw
    monkeypatch.setattr(serve, "withdraw", lambda *of: (server.events.append("withdraw"), withdraw(*of)))
    node.leave()
    until(lambda: server.events == ["start", "withdraw", "stop"])
    assert not registered()
