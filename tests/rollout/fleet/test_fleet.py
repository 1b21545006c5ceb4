"""The fleet's timing, faults and refusals, with servers that fail on demand; real ones are in test_weights and test_faults."""

import errno
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_control import FakeServer
from safetensors.torch import load_file
from server_faults import DRIPS, REPLIES, reply
from waiting import Clock, until

from nft_megatron.base import deadline as deadline_module
from nft_megatron.base.backoff import Backoff
from nft_megatron.base.errors import StoppedEarly, UserError
from nft_megatron.config.fleet import FleetConfig
from nft_megatron.rollout.fleet import fleet as fleet_module
from nft_megatron.rollout.fleet import supervisor as supervisor_module
from nft_megatron.rollout.fleet.access import Credentials
from nft_megatron.rollout.fleet.control import Control, ControlError
from nft_megatron.rollout.fleet.fleet import Fleet
from nft_megatron.rollout.fleet.notice import WaitNotice
from nft_megatron.rollout.fleet.registry import Registration, register, run_key, withdraw
from nft_megatron.rollout.fleet.server import ServerSettings
from nft_megatron.rollout.fleet.supervisor import ServerStats
from nft_megatron.weights.fingerprint import weights_fingerprint

PATIENCE = 120.0


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Supervisors check and retry often."""
    monkeypatch.setattr(supervisor_module, "_CHECK_SECONDS", 0.05)
    monkeypatch.setattr(supervisor_module, "Backoff", lambda: Backoff(0.05, 0.2))


@pytest.fixture
def fakes():
    servers = [FakeServer(), FakeServer()]
    yield servers
    for server in servers:
        server.speak()
        server.close()


@pytest.fixture
def open_fleet(tmp_path, model_folder):
    """Opens a fleet over the given URLs; keyword arguments set fields of the section ``fleet``."""
    fleets = []

    def begin(urls=(), interrupted=lambda: None, **fields):
        (tmp_path / "key").write_text("secret")
        fields = {"sync_seconds": PATIENCE, "silence_seconds": PATIENCE, "wait_seconds": PATIENCE, **fields}
        section = FleetConfig(urls=tuple(urls), key_file=tmp_path / "key", **fields)
        settings = ServerSettings(model_folder, tmp_path / "fleet", tmp_path / "logs", "secret")
        fleets.append(Fleet(section, settings, tmp_path / "weights", interrupted=interrupted))
        fleets[-1].start()
        return fleets[-1]

    yield begin
    for fleet in fleets:
        fleet.close()


@pytest.fixture(scope="session")
def tensors(model_folder):
    return load_file(model_folder / "model.safetensors")


def names(fleet):
    return {member.name for member in fleet.serving()}


def state(fleet, name):
    return next((stats.state for stats in fleet.stats() if stats.name == name), None)


def test_all_servers_get_a_version_in_the_order_that_works(fakes, open_fleet, tensors, tmp_path):
    fleet = open_fleet([server.url for server in fakes], min_servers=2)
    assert fleet.serving() == []
    assert fleet.publish(tensors.items(), 3) == weights_fingerprint(tensors.items())
    assert [(member.weight_version, member.credentials) for member in fleet.serving()] == [(3, Credentials("secret"))] * 2
    assert {words for server in fakes for words in server.authorizations} == {"Bearer secret"}
    for server in fakes:
        calls = [call for call in server.calls if call != "/weight_info"]
        assert calls == [
            "/pause",
            "nft_abort_update",
            "/start_weight_update",
            "/update_weights",
            "/finish_weight_update",
            "nft_fingerprint",
            "nft_compare_model",
            "/reset_prefix_cache",
            "/resume",
            "/v1/completions",
        ]
    assert [stats.sync_bytes for stats in fleet.stats()] == [sum(tensor.nbytes for tensor in tensors.values())] * 2
    for version in (4, 5, 6):
        fleet.publish(tensors.items(), version)
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["version_000005", "version_000006"]
    saved = load_file(tmp_path / "weights" / "version_000006" / "model-00001.safetensors")
    assert weights_fingerprint(saved.items()) == weights_fingerprint(tensors.items())


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_stream_that_is_not_the_model_reaches_no_server(fakes, open_fleet, tensors, tmp_path, change):
    fleet = open_fleet([fakes[0].url])
    fleet.publish(tensors.items(), 1)
    wrong = dict(tensors)
    norm = wrong.pop("model.norm.weight")
    if change != "missing":
        wrong["model.norm.weigth" if change == "unexpected" else "model.norm.weight"] = norm[:-1]
    with pytest.raises(UserError, match=r"model\.norm\.wei"):
        fleet.publish(wrong.items(), 2)
    assert fakes[0].label == "1" and [member.weight_version for member in fleet.serving()] == [1]
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["version_000001"]


@pytest.mark.parametrize("fault", ["tampered", "misheld"])
def test_wrong_weights_are_rejected_and_retried(fakes, open_fleet, tensors, fault):
    setattr(fakes[0], fault, True)
    fleet = open_fleet([server.url for server in fakes])
    fleet.publish(tensors.items(), 1)
    until(lambda: fakes[0].calls.count("/update_weights") >= 2)  # two refusals, after which the server is written off
    assert names(fleet) == {"url-1"}
    assert "/resume" not in fakes[0].calls and fakes[0].paused
    setattr(fakes[0], fault, False)
    until(lambda: names(fleet) == {"url-0", "url-1"})


def test_a_server_whose_weights_behave_differently_is_rejected(fakes, open_fleet, tensors):
    fleet = open_fleet([fakes[0].url, fakes[1].url])
    fakes[1].logprob, fakes[1].silent = -3.0, {"/v1/completions"}
    fleet.publish(tensors.items(), 1)  # the first server that has it sets the standard
    assert names(fleet) == {"url-0"}
    fakes[1].speak()
    until(lambda: any("log-probs differ by 2.00 nats" in stats.reason for stats in fleet.stats()))
    assert names(fleet) == {"url-0"}


@pytest.mark.parametrize("route", ["/update_weights", "/finish_weight_update", "/reset_prefix_cache", "/v1/completions"])
def test_a_sync_that_fails_halfway_is_repeated(fakes, open_fleet, tensors, route):
    fakes[0].status[route] = 500
    fleet = open_fleet([server.url for server in fakes])
    fleet.publish(tensors.items(), 1)
    until(lambda: route in fakes[0].calls)
    until(lambda: names(fleet) == {"url-1"})
    del fakes[0].status[route]
    until(lambda: names(fleet) == {"url-0", "url-1"})
    assert fakes[0].label == "1" and not fakes[0].paused


def test_a_server_silent_during_a_sync_delays_no_other_and_gets_no_work_until_refreshed(fakes, open_fleet, tensors):
    fleet = open_fleet([server.url for server in fakes], silence_seconds=0.5, sync_seconds=1.0)
    fleet.publish(tensors.items(), 1)
    until(lambda: names(fleet) == {"url-0", "url-1"})
    fakes[0].silent = {"/weight_info", "/pause"}
    fleet.publish(tensors.items(), 2)
    assert "url-0" not in names(fleet)
    until(lambda: names(fleet) == {"url-1"})  # its replies may have been late too
    until(lambda: state(fleet, "url-0") == "dead")
    assert fakes[0].label == "1" and "url-0" not in names(fleet)
    fakes[0].speak()
    until(lambda: names(fleet) == {"url-0", "url-1"})
    assert fakes[0].label == "2"


def test_a_restarted_server_is_detected_by_its_version(fakes, open_fleet, tensors):
    fleet = open_fleet([fakes[0].url])
    fleet.publish(tensors.items(), 1)
    fakes[0].restart()
    until(lambda: fakes[0].calls.count("/update_weights") == 2 and names(fleet) == {"url-0"})
    assert fakes[0].fingerprint == weights_fingerprint(tensors.items())


def test_client_reports_suspend_a_server_and_a_check_reinstates_it(fakes, open_fleet, tensors):
    fleet = open_fleet([fakes[0].url])
    fleet.publish(tensors.items(), 1)
    (member,) = fleet.serving()
    fakes[0].silent = {"/weight_info"}
    until(lambda: fakes[0].num_waiting == 1)  # the earlier check is answered after the reports
    for _ in range(50):  # one cause interrupts many requests
        fleet.report(member, ok=False, error="connection reset")
    assert fleet.serving() == [] and fleet.stats()[0].reason == "connection reset"
    fakes[0].speak()
    until(lambda: names(fleet) == {"url-0"})
    assert fakes[0].calls.count("/update_weights") == 1


def test_a_written_off_server_returns_only_through_a_refresh(fakes, open_fleet, tensors):
    fleet = open_fleet([fakes[0].url])
    fleet.publish(tensors.items(), 1)
    (member,) = fleet.serving()
    fakes[0].status["/weight_info"] = 500
    until(lambda: state(fleet, "url-0") == "dead")
    fakes[0].status["/update_weights"] = 500
    del fakes[0].status["/weight_info"]
    until(lambda: fakes[0].calls.count("/update_weights") >= 2)
    fleet.report(member, ok=True)  # from a request that was in progress: it proves nothing about the weights
    assert fleet.serving() == []
    num_loads = fakes[0].calls.count("/update_weights")
    del fakes[0].status["/update_weights"]
    until(lambda: names(fleet) == {"url-0"})
    assert fakes[0].calls.count("/update_weights") > num_loads


def test_too_few_servers_stop_the_run_with_75(fakes, open_fleet, tensors):
    fakes[0].status["/weight_info"] = 503
    fleet = open_fleet([server.url for server in fakes], min_servers=2, wait_seconds=0.1)
    with pytest.raises(
        StoppedEarly, match=r"[01] of fleet\.min_servers = 2 servers are serving after 0\.1 s: url-0 starting"
    ) as caught:
        fleet.publish(tensors.items(), 1)
    assert caught.value.exit_code == 75
    until(lambda: names(fleet) == {"url-1"})
    with pytest.raises(StoppedEarly, match=r"1 of fleet\.min_servers = 2 servers are serving after 0\.1 s: url-0 starting"):
        fleet.wait_for_servers(0.1)
    del fakes[0].status["/weight_info"]
    fleet.wait_for_servers(PATIENCE)
    assert names(fleet) == {"url-0", "url-1"}


def test_waiting_ends_when_servers_are_no_longer_wanted(open_fleet):
    fleet = open_fleet()
    looks = iter([False, True])
    fleet.wait_for_servers(3600.0, lambda: next(looks))
    assert next(looks, None) is None


def test_a_wait_says_what_for_and_ends_with_a_request_to_stop(fakes, open_fleet, tensors, tmp_path, caplog, monkeypatch):
    """At once where servers are missing: it looks at the request whenever it looks at the servers."""
    asked = []
    fakes[0].status["/weight_info"] = 503
    fleet = open_fleet([fakes[0].url], interrupted=lambda: asked[0] if asked else None)
    log = threading.Thread(target=lambda: (until(lambda: "waiting for servers" in caplog.text), asked.append("SIGTERM")))
    log.start()
    with pytest.raises(StoppedEarly, match=r"stopped by SIGTERM while waiting for servers \(0 of fleet\.min_servers = 1"):
        fleet.publish(tensors.items(), 1)
    log.join()
    assert "s at most: 0 of fleet.min_servers = 1 servers are serving (url-0 starting)" in caplog.text
    with pytest.raises(StoppedEarly, match="stopped by SIGTERM"):
        fleet.wait_for_servers(3600.0)
    del fakes[0].status["/weight_info"]
    until(lambda: names(fleet) == {"url-0"})
    fleet.wait_for_servers(3600.0)  # enough are there: nothing to wait for
    fleet.publish(tensors.items(), 2)  # it is there, and only loads


def test_without_any_server_it_says_how_to_start_one(open_fleet, tmp_path, caplog):
    fleet = open_fleet()
    with pytest.raises(StoppedEarly, match="there are none"):
        fleet.wait_for_servers(0.1)
    run = tmp_path  # its folder of servers is RUN/fleet
    assert f"none has registered in {run}/fleet: start one with `nft-megatron serve {run}`, or set fleet.servers" in caplog.text


def test_notices_are_few(caplog, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(deadline_module, "time", clock)
    servers = [ServerStats("a", "starting", -1, 0, 0.0, 0, "")]
    notice = WaitNotice(has_served=True)

    def count() -> int:
        notice.look("0 of 1 are serving", servers, 100.0, Path("RUN/fleet"))
        return caplog.text.count("waiting for servers, 100 s at most: 0 of 1 are serving (")

    assert [count(), count()] == [0, 0], "new weights are loaded at every step"
    clock.added += 11
    assert [count(), count()] == [1, 1]
    servers[0] = replace(servers[0], state="dead", reason="signal 9")
    assert [count(), count()] == [2, 2]
    assert "(a dead); a: signal 9" in caplog.text
    clock.added += 61
    assert [count(), count()] == [3, 3]
    WaitNotice(has_served=False).look("0 of 1 are serving", servers, 100.0, Path("RUN/fleet"))
    assert caplog.text.count("waiting for servers") == 4


def test_late_joiners_register_are_refreshed_serve_move_and_leave(fakes, open_fleet, tensors, tmp_path):
    fleet = open_fleet([fakes[0].url])
    fleet.publish(tensors.items(), 1)
    folder, now = tmp_path / "fleet", time.time()
    fakes[1].key, fakes[1].server_id = run_key(folder), "5a"
    assert (folder / "key").stat().st_mode & 0o777 == 0o600
    node = Registration("node", fakes[1].url, "here", 1, started=now, heartbeat=now, server_id="5a")
    (folder / "other.json").write_text(json.dumps({"name": "other"}))
    register(folder, Registration("old", fakes[1].url, "here", 1, started=now - 9999, heartbeat=now - 9999))
    register(folder, node)
    until(lambda: "node" in names(fleet))
    assert fakes[1].label == "1"
    assert {stats.name for stats in fleet.stats()} == {"url-0", "node"}

    third = FakeServer(fakes[1].key, "5b")
    register(folder, Registration("node", third.url, "here", 2, started=now + 1, heartbeat=now, server_id="5b"))
    until(lambda: any(member.url == third.url for member in fleet.serving()))
    assert third.label == "1"
    withdraw(folder, "node")
    until(lambda: names(fleet) == {"url-0"})
    third.close()


@pytest.mark.parametrize(("what", "number"), [("file", errno.ESTALE), ("folder", errno.EIO), ("folder gone", 0)])
def test_registrations_unreadable_for_a_while_leave_the_servers_as_they_were(
    fakes, open_fleet, tensors, tmp_path, monkeypatch, caplog, what, number
):
    monkeypatch.setattr(fleet_module, "_DISCOVER_SECONDS", 0.02)
    fleet = open_fleet()
    folder, now, looks, discover = tmp_path / "fleet", time.time(), [], fleet_module.discover
    monkeypatch.setattr(fleet_module, "discover", lambda *of: looks.append(0) or discover(*of))
    fakes[0].key, fakes[0].server_id = run_key(folder), "5a"
    node = Registration("node", fakes[0].url, "here", 1, started=now, heartbeat=now, server_id="5a")
    register(folder, node)
    fleet.publish(tensors.items(), 1)
    incarnation = fleet.serving()[0].incarnation
    open_file, listdir = os.open, os.listdir

    def away(path):
        raise OSError(number, "away", path)

    with monkeypatch.context() as patch:
        if what == "file":
            patch.setattr(os, "open", lambda path, *of: away(path) if Path(path).stem == "node" else open_file(path, *of))
        elif what == "folder":
            patch.setattr(os, "listdir", lambda path: away(path) if Path(path) == folder else listdir(path))
        else:
            folder.rename(tmp_path / "aside")
            until(lambda: "No such file" in caplog.text)
        begun = len(looks)
        until(lambda: len(looks) > begun + 5)
        assert names(fleet) == {"node"} and fleet.serving()[0].incarnation == incarnation
    assert caplog.text.count("could not look for servers") == (what != "file")
    if what == "folder gone":
        (tmp_path / "aside").rename(folder)
    withdraw(folder, "node")
    until(lambda: not fleet.stats())
    register(folder, node)
    until(lambda: names(fleet) == {"node"})


def test_a_key_that_cannot_be_read_yet_delays_only_the_joiner(fakes, open_fleet, tensors, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fleet_module, "_DISCOVER_SECONDS", 0.02)
    fleet = open_fleet([fakes[0].url])
    folder, now = tmp_path / "fleet", time.time()
    (folder / "key").write_text("")
    fakes[1].server_id = "5a"
    register(folder, Registration("node", fakes[1].url, "here", 1, started=now, heartbeat=now, server_id="5a"))
    until(lambda: "is empty" in caplog.text)
    fleet.publish(tensors.items(), 1)
    assert names(fleet) == {"url-0"}
    (folder / "key").write_text("secret")
    until(lambda: names(fleet) == {"url-0", "node"})


def test_busy_servers_together_delay_a_broadcast_by_silence_seconds_only(fakes, open_fleet, tensors):
    fleet = open_fleet([fakes[0].url] * 5 + [fakes[1].url], silence_seconds=77.0)
    until(lambda: all(stats.state == "stale" for stats in fleet.stats()))
    *held, free = fleet._all()
    together = threading.Barrier(len(held))

    class Held:
        """A claim held elsewhere: the broadcast waits for all such claims at once, each for the full time allowed."""

        def acquire(self, timeout):
            if timeout == 77.0:  # silence_seconds; the supervisor's own thread also tries
                together.wait(PATIENCE)
            else:
                time.sleep(timeout)
            return False

    for supervisor in held:
        supervisor.claim = Held()
    assert fleet._claim_idle() == [free]
    assert not together.broken
    free.claim.release()


def test_malformed_replies_count_as_refusals(fakes, open_fleet, tensors):
    fakes[0].prompt_logprobs = False
    fleet = open_fleet([server.url for server in fakes])
    fleet.publish(tensors.items(), 1)
    until(lambda: state(fleet, "url-0") == "dead")
    assert fakes[0].calls.count("/pause") >= 2
    assert "missing required field `prompt_logprobs`" in next(stats.reason for stats in fleet.stats() if stats.name == "url-0")
    fakes[0].prompt_logprobs = True
    until(lambda: names(fleet) == {"url-0", "url-1"})


@pytest.mark.parametrize("answer", [[1], None, "text", {}])
def test_a_reply_that_is_not_a_json_object_is_reported(fakes, monkeypatch, answer):
    monkeypatch.setattr(fakes[0], "act", lambda *_: answer)
    with pytest.raises(ControlError, match="/weight_info sent an unexpected reply"):
        Control(fakes[0].url, "secret").version()


@pytest.mark.parametrize("fault", REPLIES)
def test_a_hostile_reply_is_reported(fakes, fault):
    pieces, message = REPLIES[fault]
    fakes[0].raw["/weight_info"] = pieces
    with pytest.raises(ControlError, match=rf"/weight_info.*({message})") as raised:
        Control(fakes[0].url, "secret", PATIENCE).version()
    assert len(str(raised.value)) < 900 and str(raised.value).isprintable()
    assert fakes[0].calls == ["/weight_info"]  # no redirect was followed


@pytest.mark.parametrize("label", ["9" * 5000, "-3", "٣", "", "default", "1.0"])
def test_a_label_that_no_step_gives_is_no_version(fakes, label):
    fakes[0].label = label
    assert Control(fakes[0].url, "secret").version() is None


@pytest.mark.parametrize("fault", DRIPS)
def test_a_call_has_one_deadline_however_slowly_a_server_drips(fakes, fault):
    begin, piece = DRIPS[fault]
    over = threading.Event()

    def drip():
        yield begin
        while not over.wait(0.02):
            yield piece

    fakes[0].raw["/weight_info"] = drip
    try:
        with pytest.raises(ControlError, match=r"did not answer within 0\.3 s") as raised:
            Control(fakes[0].url, "secret", 0.3).version()
    finally:
        over.set()
    assert raised.value.silent


@pytest.mark.parametrize(
    ("number", "is_right"), [(1, True), (8, True), (0, False), (-1, False), (10**9, False), ("2", False), (1.5, False)]
)
def test_a_server_has_a_plausible_number_of_workers(fakes, monkeypatch, number, is_right):
    monkeypatch.setattr(fakes[0], "act", lambda *_: {"world_size": number})
    control = Control(fakes[0].url, "secret")
    if is_right:
        assert control.num_workers() == number
        return
    with pytest.raises(ControlError, match="unexpected reply"):
        control.num_workers()


def test_whoever_has_a_servers_port_without_the_key_learns_nothing_and_is_not_believed(fakes, open_fleet, tensors, tmp_path):
    """A registered server's place was taken: by another process, and by another start that knows the key."""
    fleet = open_fleet([fakes[0].url])
    folder, now, strangers = tmp_path / "fleet", time.time(), {"other": FakeServer("guessed", "5a"), "old": FakeServer()}
    strangers["old"].key, strangers["old"].server_id = run_key(folder), "4f"
    for name, stranger in strangers.items():
        stranger.raw["/weight_info"] = lambda: reply(b'{"weight_version": "1"}')
        register(folder, Registration(name, stranger.url, "here", 1, started=now, heartbeat=now, server_id="5a"))
    fleet.publish(tensors.items(), 1)
    for name, stranger in strangers.items():
        until(lambda stranger=stranger: len(stranger.calls) > 3)
        assert set(stranger.calls) == {"/weight_info"} and state(fleet, name) == "starting"
        assert not any(run_key(folder) in words for words in stranger.authorizations)
        assert "without proof that it is the server that was started" in str(fleet.stats())
        stranger.close()
    assert names(fleet) == {"url-0"}


def test_files_that_register_no_server_are_told_once(fakes, open_fleet, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fleet_module, "_DISCOVER_SECONDS", 0.02)
    fleet = open_fleet([fakes[0].url])
    now, looks, discover = time.time(), [], fleet_module.discover
    monkeypatch.setattr(fleet_module, "discover", lambda *of: looks.append(0) or discover(*of))
    (tmp_path / "fleet" / "deep.json").write_text("[" * 10_000)
    local = Registration("url-0", fakes[1].url, "here", 1, started=now, heartbeat=now)
    register(tmp_path / "fleet", local)
    until(lambda: len(looks) > 5)
    assert caplog.text.count("deep.json is not the registration of a server") == 1
    assert caplog.text.count("'url-0': is no name for a server") == 1
    assert [stats.name for stats in fleet.stats()] == ["url-0"] and not fakes[1].calls


def test_a_stream_that_spans_several_files(fakes, open_fleet, tensors, tmp_path):
    fleet = open_fleet([fakes[0].url], bucket_bytes=10_000)
    fleet.publish(tensors.items(), 1)
    paths = sorted((tmp_path / "weights" / "version_000001").glob("*.safetensors"))
    assert len(paths) > 1
    together = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    assert all(torch.equal(together[name], tensor) for name, tensor in tensors.items()) and len(together) == len(tensors)
    assert fakes[0].fingerprint == weights_fingerprint(tensors.items())


def test_different_weights_under_the_same_version_are_new_weights(fakes, open_fleet, tensors):
    fleet = open_fleet([fakes[0].url])
    fleet.publish(tensors.items(), 1)
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    fingerprint = fleet.publish(other.items(), 1)
    assert [member.health.fingerprint for member in fleet.serving()] == [fingerprint] != [weights_fingerprint(tensors.items())]
    assert fakes[0].fingerprint == fingerprint


def test_devices_must_match_the_servers(open_fleet):
    with pytest.raises(UserError, match=r"not for fleet\.servers = 0"):
        open_fleet(devices=("0",))


def test_a_missing_key_file_is_reported(tmp_path, model_folder):
    section = FleetConfig(urls=("http://127.0.0.1:1",), key_file=Path(tmp_path / "none"))
    with pytest.raises(UserError, match=r"fleet\.key_file"):
        Fleet(section, ServerSettings(model_folder, tmp_path / "f", tmp_path, "k"), tmp_path / "w").start()
