"""Who is let in by a server's middleware, and by what a reply proves where it comes from; the reference is fake_proof.py."""

import asyncio

import pytest
from fake_proof import mac, proof

from nft_megatron.rollout.fleet.access import Credentials, RequireKey, is_proof

KEY, START = "the-key", "5a"


@pytest.fixture
def call(monkeypatch):
    """Sends a request through the middleware; returns what the application saw and what the caller got."""
    monkeypatch.setenv("NFT_MEGATRON_FLEET_KEY", KEY)
    monkeypatch.setenv("NFT_MEGATRON_SERVER_ID", START)

    def send(authorization, method="GET", path="/weight_info", kind="http"):
        seen, sent = [], []

        async def app(scope, receive, send):
            seen.append(scope["path"])
            await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
            await send({"type": "http.response.body", "body": b"{}"})

        async def collect(message):
            sent.append(message)

        headers = [] if authorization is None else [(b"authorization", authorization)]
        scope = {"type": kind, "method": method, "path": path, "headers": headers}
        asyncio.run(RequireKey(app)(scope, None, collect))
        return seen, sent

    return send


def test_a_signed_request_is_answered_with_a_proof(call):
    authorization, expected = Credentials(KEY, START).authorize("GET", "/weight_info")
    seen, (start, body) = call(authorization.encode())
    assert (seen, start["status"], body["body"]) == (["/weight_info"], 200, b"{}")
    assert start["headers"] == [(b"a", b"b"), (b"x-nft-proof", expected.encode())]
    assert expected == proof(KEY, START, authorization, "GET", "/weight_info")
    assert KEY not in authorization


def test_every_request_is_another(call):
    first, second = (Credentials(KEY, START).authorize("GET", "/weight_info") for _ in range(2))
    assert first[0] != second[0] and first[1] != second[1]
    assert not is_proof(first[1], second[1])


def test_the_key_itself_is_taken_without_a_proof(call):
    seen, (start, _) = call(f"Bearer {KEY}".encode())
    assert seen == ["/weight_info"] and start["headers"] == [(b"a", b"b")]


@pytest.mark.parametrize("what", ["path", "method", "start", "key", "nonce"])
def test_what_was_signed_for_something_else_opens_nothing(call, what):
    key, start = ("another" if what == "key" else KEY), ("5b" if what == "start" else START)
    method, path = ("POST" if what == "method" else "GET"), ("/pause" if what == "path" else "/weight_info")
    authorization, _ = Credentials(key, start).authorize(method, path)
    if what == "nonce":
        scheme, _, signature = authorization.split()
        authorization = f"{scheme} {'0' * 32} {signature}"
    seen, (start, _) = call(authorization.encode())
    assert seen == [] and start["status"] == 401 and start["headers"] == [(b"content-type", b"text/plain")]


@pytest.mark.parametrize(
    "authorization",
    [None, b"", b"NFT", b"NFT ", b"NFT  ", b"NFT a", b"NFT a b c", b"NFT \xff \xfe", b"nft a b", b"Bearer x", b"\xff" * 5000],
)
def test_everything_else_is_refused(call, authorization):
    seen, (start, body) = call(authorization)
    assert (seen, start["status"], body["body"]) == ([], 401, b"wrong or missing key")


def test_a_websocket_needs_the_key_itself(call):
    authorization, _ = Credentials(KEY, START).authorize("GET", "/weight_info")
    assert call(authorization.encode(), kind="websocket") == ([], [{"type": "websocket.close", "code": 1008}])
    assert call(f"Bearer {KEY}".encode(), kind="websocket")[0] == ["/weight_info"]


@pytest.mark.parametrize("given", ["", "x", "é", "\udcff", "0" * 64])
def test_other_proofs_are_none(given):
    assert not is_proof(given, mac(KEY, START, "reply", "1"))
