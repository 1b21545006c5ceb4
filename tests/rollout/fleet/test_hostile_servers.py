"""Fuzzers of what a server sends: no reply crashes the client, hangs it, or lets an answer through that is none.

Each starts from valid text and from ``server_faults.py`` and changes JSON values, bytes, and where the text is cut into pieces.
What is accepted is judged a second time, here, token by token. The seeds are fixed; a failure prints what reproduces it, to be
kept as an ``@example``.
"""

import asyncio
import contextlib
import copy
import json
import math
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_vllm import STOP, VOCABULARY, expected_answer, sampling
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from server_faults import head

from nft_megatron.base.records import Request
from nft_megatron.rollout.answer_rule import AnswerRule
from nft_megatron.rollout.fleet import client, registry
from nft_megatron.rollout.fleet.access import Credentials
from nft_megatron.rollout.fleet.client import Finished, Progress, Refused, make_body
from nft_megatron.rollout.fleet.control import Control, ControlError
from nft_megatron.rollout.fleet.registry import Registration, discover
from nft_megatron.rollout.fleet.session import ServerFault, open_session

pytestmark = pytest.mark.slow
LIMIT = 60.0  # guards only against hanging
MAX_TOKENS, NUM_ANSWERS = 12, 3
PROMPT = np.array([1, 2, 3], dtype=np.int32)
fuzz = settings(max_examples=300, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))

EDGES = [2**31, 2**63, 2**64, -(2**31), 10**400, -9999, 1e39, -1e39, 1e-320, -0.0, 0.5, float("nan"), float("inf")]
WORDS = ["stop", "length", "abort", "0", "3", "9" * 5000]
values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 60) | st.text(max_size=5) | st.sampled_from(EDGES) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw, tree):
    """``tree`` (JSON) with some values replaced, left out, repeated or moved."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(0, 3))):
        places = list(_places(tree))
        if not places:
            break
        parent, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(["replace", "replace", "delete", "repeat", "swap"]))
        if action == "replace":
            parent[key] = draw(values)
        elif action == "delete":
            del parent[key]
        elif action == "repeat" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif action == "swap":
            other, place = draw(st.sampled_from(places))
            with contextlib.suppress(LookupError, RecursionError):
                parent[key] = copy.deepcopy(other[place])
    return tree


def _places(tree):
    for key, value in enumerate(tree) if isinstance(tree, list) else tree.items() if isinstance(tree, dict) else ():
        yield tree, key
        yield from _places(value)


@st.composite
def damaged(draw, text):
    """``text`` (bytes) with some of it overwritten, removed, repeated or cut off."""
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 40)))
        text = text[:start] + draw(st.one_of(st.just(b""), st.binary(max_size=8), st.just(text[start:end] * 2))) + text[end:]
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 9)) == 0 else text


def event(index, tokens, logprobs, reason):
    spans = None if reason is None else [{"version": "3", "start": 0, "end": len(tokens)}]
    content = [{"token_id": token, "logprob": value} for token, value in zip(tokens, logprobs, strict=True)]
    choice = {"index": index, "finish_reason": reason, "token_ids": tokens, "weight_versions": spans}
    return {"request_id": "r", "choices": [{**choice, "logprobs": {"content": content}}]}


STREAM = [event(index, *expected_answer(5 + index, MAX_TOKENS)) for index in range(NUM_ANSWERS)]
CHUNKED = head(Content_Type="text/event-stream", Connection="close")


@st.composite
def streams(draw):
    """A whole reply to a request, in pieces."""
    parts = [json.dumps(part).encode() for part in draw(changed(STREAM))] if draw(st.booleans()) else []
    parts = parts or [json.dumps(draw(changed(part))).encode() for part in STREAM]
    body = b"".join(b"data: " + part + b"\n\n" for part in parts) + b"data: [DONE]\n\n"
    begin = draw(st.sampled_from([CHUNKED, CHUNKED, head(length=len(body)), head(Content_Encoding="gzip"), head("500 Error")]))
    text = draw(damaged(begin + body))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


class Replier:
    """Replies to every request with the pieces of ``reply``, then closes the connection."""

    def __init__(self):
        self.reply, self.loop = [b""], asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self.serve, "127.0.0.1", 0), self.loop).result(
            LIMIT
        )
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def serve(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            asked = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = next((int(line.split(":")[1]) for line in asked.split("\r\n") if line.startswith("content-length:")), 0)
            await reader.readexactly(length)
            for piece in self.reply:
                writer.write(piece)
                await writer.drain()
        writer.close()


@pytest.fixture(scope="module")
def replier():
    return Replier()


def assert_is_an_answer(completion):
    """Everything that a caller relies on, token by token."""
    tokens, logprobs = completion.tokens.tolist(), completion.logprobs.tolist()
    assert (completion.tokens.dtype, completion.logprobs.dtype) == (np.int32, np.float32)
    assert 1 <= len(tokens) == len(logprobs) <= MAX_TOKENS
    assert all(0 <= token < VOCABULARY for token in tokens)
    assert all(math.isfinite(value) and -9999 < value <= 0 for value in logprobs)
    assert STOP not in tokens[:-1]
    assert completion.finish_reason == ("stop" if tokens[-1] == STOP else "length")
    assert completion.finish_reason == "stop" or len(tokens) == MAX_TOKENS
    assert completion.request_id == 7 and completion.index in range(20, 20 + NUM_ANSWERS)


@seed(18)
@fuzz
@given(reply=streams())
@example(reply=[CHUNKED + b'data: {"choices":[{"index":0}]}\n\n'])
@example(reply=[head() + b"data: " + b"[" * 5000, b"]" * 5000 + b"\n\n"])
def test_streams(replier, reply):
    replier.reply = reply
    rule = AnswerRule(sampling(MAX_TOKENS), VOCABULARY, Path("unused"))
    events = []

    async def run():
        async with open_session() as session:
            body = make_body(PROMPT, 5, NUM_ANSWERS, sampling(MAX_TOKENS))
            request, indices = Request(7, PROMPT, (5, 6, 7)), range(20, 20 + NUM_ANSWERS)
            async for event in client.generate(session, replier.url, Credentials("key"), body, request, indices, rule):
                events.append(event)

    fault = None
    try:
        asyncio.run(asyncio.wait_for(run(), LIMIT))
    except (ServerFault, Refused) as error:
        fault = str(error)
    finished = [event for event in events if isinstance(event, Finished)]
    assert len({event.completion.index for event in finished}) == len(finished)
    assert len(fault) < 1000 if fault is not None else len(finished) == NUM_ANSWERS
    for event in finished:
        assert_is_an_answer(event.completion)
        assert event.completion.weight_version == min(event.versions, default=-1)
    for index in range(20, 20 + NUM_ANSWERS):
        assert sum(event.num_tokens for event in events if isinstance(event, Progress) and event.index == index) <= MAX_TOKENS


CALLS = {
    "version": (lambda control: control.version(), {"weight_version": "3"}),
    "workers": (lambda control: control.num_workers(), {"world_size": 2}),
    "reset": (lambda control: control.reset_prefix_cache(), {"success": True}),
    "fingerprints": (lambda control: control.fingerprints(LIMIT), {"results": [{"fingerprint": "5a"}]}),
    "wrong": (lambda control: control.wrong_tensors(LIMIT), {"results": [{"wrong": ["a", "b"]}]}),
    "canary": (
        lambda control: control.canary(50, LIMIT),
        {"choices": [{"prompt_logprobs": [None, *({str((7 * i + 1) % 50): {"logprob": -1.0}} for i in range(1, 8))]}]},
    ),
    "resume": (lambda control: control.resume(), {}),
}


@st.composite
def replies(draw):
    name = draw(st.sampled_from(sorted(CALLS)))
    body = json.dumps(draw(changed(CALLS[name][1]))).encode()
    begin = head(draw(st.sampled_from(["200 OK", "200 OK", "307 Moved", "500 Error"])), len(body))
    return name, draw(damaged(begin + body))


@seed(18)
@fuzz
@given(sent=replies())
@example(sent=("version", head(length=4) + b'"\xff"'))
@example(sent=("wrong", head() + b'{"results":[{"wrong":["' + b"a" * (5 << 20) + b'"]}]}'))
def test_control_replies(replier, sent):
    name, text = sent
    replier.reply = [text]
    began, fault = time.monotonic(), None
    try:
        value = CALLS[name][0](Control(replier.url, "key", LIMIT))
    except ControlError as error:
        fault = str(error)
    assert time.monotonic() - began < LIMIT
    if fault is not None:
        assert len(fault) < 1000
    elif name == "version":
        assert value is None or (type(value) is int and value >= 0)
    elif name == "workers":
        assert type(value) is int and 1 <= value <= 65536
    elif name in ("fingerprints", "wrong"):
        assert type(value) is list and all(type(word) is str for word in value)
    elif name == "canary":
        assert len(value) == 7 and all(type(number) is float for number in value)
    else:
        assert value is None


FILE = {"name": "n", "url": "http://h:1", "host": "h", "pid": 1, "started": 1.5, "heartbeat": 0.0, "server_id": "5a"}
NOW = 1.8e9
kinds = st.sampled_from(["file", "file", "file", "file", "fifo", "folder", "link", "gone"])


@st.composite
def files(draw):
    text = json.dumps(draw(changed({**FILE, "heartbeat": draw(st.sampled_from([0.0, NOW, NOW + 500]))}))).encode()
    name = draw(st.sampled_from(["n.json", "n.json", "local-0.json", ".n.json", "n.json.json", "é.json", "n"]))
    return name, draw(kinds), draw(damaged(text))


@seed(18)
@fuzz
@given(found=st.lists(files(), max_size=3))
@example(found=[("n.json", "file", b"[" * 60_000)])
def test_registry_files(tmp_path_factory, found):
    folder = tmp_path_factory.mktemp("fleet")
    good = Registration("good", "http://h:1", "h", 1, started=0.0, heartbeat=NOW)
    (folder / "good.json").write_text(json.dumps(vars(good)))
    for name, kind, text in found:
        path = folder / name
        if os.path.lexists(path):
            continue
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind != "file":
            path.symlink_to(folder / "good.json" if kind == "link" else folder / "gone")
        else:
            path.write_bytes(text)
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "time", SimpleNamespace(time=lambda: NOW))
        registered = discover(folder, tell=told.append)
    assert registered.pop("good") == good
    assert all(len(text) < 1000 for text in told)
    for name, registration in registered.items():
        path = folder / f"{name}.json"
        assert path.is_file() and not path.is_symlink() and name == registration.name == "n"
        scheme, _, place = registration.url.partition("://")
        host, _, port = place.rpartition(":")
        assert scheme == "http" and host and "/" not in place and "@" not in place and 0 < int(port) < 65536
        assert abs(registration.heartbeat - NOW) < 600 and math.isfinite(registration.started)
        assert type(registration.pid) is int and type(registration.server_id) is str
