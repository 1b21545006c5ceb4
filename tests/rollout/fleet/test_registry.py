"""What is read as the registration of a server, and what is not: files of any kind and content under RUN/fleet."""

import json
import os
import time

import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.rollout.fleet.registry import Registration, discover, read_key, register, run_key


def fields(**changes):
    return {"name": "good", "url": "http://h:1", "host": "h", "pid": 1, "started": 0.0, "heartbeat": time.time(), **changes}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "good.json").write_text(json.dumps(fields()))
    return tmp_path


def look(folder):
    told = []
    return sorted(discover(folder, tell=told.append)), told


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"url": 5}, "Expected `str`, got `int`"),
        ({"url": ["http://h:1"]}, "Expected `str`, got `array`"),
        ({"url": "https://h:1"}, "is not http://host:port"),
        ({"url": "http://h"}, "is not http://host:port"),
        ({"url": "http://h:0"}, "is not http://host:port"),
        ({"url": "http://h:99999"}, "Port out of range"),
        ({"url": "http://:1"}, "is not http://host:port"),
        ({"url": "http://user@h:1"}, "is not http://host:port"),
        ({"url": "http://h:1/path"}, "is not http://host:port"),
        ({"url": "http://h:1?a=b"}, "is not http://host:port"),
        ({"url": "http://h:1#a"}, "is not http://host:port"),
        ({"url": "http://h\n:1"}, "is not http://host:port"),
        ({"url": "file:///etc/passwd"}, "is not http://host:port"),
        ({"url": "http://[h:1"}, "Invalid IPv6"),
        ({"started": True}, "Expected `float`, got `bool`"),
        ({"pid": 1.5}, "Expected `int`, got `float`"),
        ({"pid": None}, "Expected `int`, got `null`"),
        ({"host": {}}, "Expected `str`, got `object`"),
        ({"server_id": 5}, "Expected `str`, got `int`"),
        ({"name": "other"}, "it names other"),
        ({"heartbeat": float("nan")}, "malformed"),
        ({"heartbeat": float("inf")}, "malformed"),
    ],
)
def test_a_file_with_other_content_registers_nothing(folder, changes, problem):
    (folder / "bad.json").write_text(json.dumps(fields(**{"name": "bad", **changes})))
    names, told = look(folder)
    assert names == ["good"] and len(told) == 1
    assert str(folder / "bad.json") in told[0] and problem in told[0]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "truncated"),
        (b"[" * 10_000, "Expected `object`, got `array`"),
        (b'{"other":' + b"[" * 10_000, "recursion"),
        (b"x" * (1 << 17), "longer than 65,536 bytes"),
        (b"\xff\xfe", "malformed"),
        (b"null", "Expected `object`, got `null`"),
        (b"{}", "missing required field `name`"),
        (b'{"heartbeat":1e999}', "out of range"),
    ],
)
def test_a_file_that_is_no_json_object_registers_nothing(folder, content, problem):
    (folder / "bad.json").write_bytes(content)
    names, told = look(folder)
    assert names == ["good"] and len(told) == 1 and problem in told[0]


@pytest.mark.parametrize("name", ["local-0", "url-0", "a b", "é", "x" * 201])
def test_no_server_registers_under_a_name_that_is_taken_or_odd(folder, name):
    (folder / f"{name}.json").write_text(json.dumps(fields(name=name)))
    names, told = look(folder)
    assert names == ["good"] and "is no name for a server" in told[0]


@pytest.mark.parametrize("kind", ["fifo", "folder", "link", "dangling link", "socket"])
def test_what_is_no_regular_file_registers_nothing_and_is_not_waited_for(folder, kind):
    path, elsewhere = folder / "a.json", folder / "elsewhere"
    elsewhere.write_text(json.dumps(fields(name="a")))
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, 0o140644)
    else:
        path.symlink_to(elsewhere if kind == "link" else folder / "nowhere")
    num_open = len(os.listdir("/proc/self/fd"))
    assert look(folder) == (["good"], [f"{path} is not the registration of a server: it is not a regular file"])
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_a_file_of_another_user_registers_nothing(folder, monkeypatch):
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    names, told = look(folder)
    assert names == [] and told[0].endswith(f"it belongs to user {owner}, not {owner + 1}")


@pytest.mark.parametrize("age", [-1e9, -601.0, 601.0, 1e9])
def test_a_file_that_is_not_renewed_or_from_the_future_is_forgotten(folder, age):
    register(folder, Registration("old", "http://h:1", "h", 1, started=0.0, heartbeat=time.time() - age))
    assert look(folder) == (["good"], [])


def test_what_is_registered_is_found(folder):
    node = Registration("node-1.b_2", "http://[::1]:20001", "h", 7, started=3.5, heartbeat=time.time(), server_id="5a")
    register(folder, node)
    assert discover(folder)["node-1.b_2"] == node


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff", "is not text in ASCII"),
        (b"one two", "holds more than one word"),
        (b"a\nb", "holds more than one word"),
        (b" \n", "is empty"),
    ],
)
def test_a_key_is_one_word(tmp_path, content, problem):
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(UserError, match=rf"fleet\.key_file = {tmp_path}/key: {problem}"):
        read_key(tmp_path / "key")


def test_the_runs_key_is_made_once_and_only_from_a_file_of_its_own(tmp_path):
    key = run_key(tmp_path / "fleet")
    assert run_key(tmp_path / "fleet") == key and len(key) == 43
    (tmp_path / "fleet" / "key").unlink()
    (tmp_path / "planted").write_text("known-to-others")
    (tmp_path / "fleet" / "key").symlink_to(tmp_path / "planted")
    with pytest.raises(UserError, match=r"RUN/fleet/key = .*: it is not a regular file; delete it: the run makes a new one"):
        run_key(tmp_path / "fleet")
    (tmp_path / "fleet" / "key").unlink()
    (tmp_path / "fleet" / "key").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="it is not a regular file"):
        run_key(tmp_path / "fleet")
    assert not (tmp_path / "nowhere").exists()
