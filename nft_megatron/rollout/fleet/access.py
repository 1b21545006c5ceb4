"""Who may call a server, and how a server proves that it is the one that was started.

The key of a run never travels to its own servers. A request carries a MAC of a fresh number, the reply another MAC of the same
number. So each side proves that it knows the key, and a process that took the port of a server that died or is about to start
learns nothing and is not believed. Both MACs name the *start* of the server (``server_id``): what one was sent opens no other.

:class:`RequireKey` is the server's side, on every route; vLLM's own check covers only ``/v1``, not weights, pausing or RPC.
``--middleware`` loads it into the API process. Standard library only.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

KEY_VARIABLE = "NFT_MEGATRON_FLEET_KEY"
SERVER_VARIABLE = "NFT_MEGATRON_SERVER_ID"
PROOF_HEADER = "X-NFT-Proof"

_SCHEME = "NFT"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Credentials:
    """How requests to one server are authorised.

    ``server_id``: the start of a server of the run; None: a server that someone else runs, which gets the key itself.

    >>> Credentials("secret").authorize("GET", "/health")
    ('Bearer secret', None)
    >>> header, proof = Credentials("secret", "5a").authorize("GET", "/health")
    >>> header.split()[0], "secret" in header, len(proof)
    ('NFT', False, 64)
    """

    key: str
    server_id: str | None = None

    def authorize(self, method: str, path: str) -> tuple[str, str | None]:
        """A request's ``Authorization`` header, and the proof that its reply must carry (None: none)."""
        if self.server_id is None:
            return f"Bearer {self.key}", None
        nonce = secrets.token_hex(16)
        return f"{_SCHEME} {nonce} {self._mac('request', nonce, method, path)}", self._mac("reply", nonce)

    def proof_for(self, authorization: str, method: str, path: str) -> str | None:
        """The server's answer to :meth:`authorize`; None if the request does not come from someone who knows the key."""
        scheme, _, rest = authorization.partition(" ")
        nonce, _, mac = rest.partition(" ")
        if scheme != _SCHEME or not hmac.compare_digest(mac.encode(), self._mac("request", nonce, method, path).encode()):
            return None
        return self._mac("reply", nonce)

    def _mac(self, *words: str) -> str:
        return hmac.digest(self.key.encode(), "\n".join([self.server_id or "", *words]).encode(), "sha256").hex()


def is_proof(given: str, expected: str) -> bool:
    """Whether a reply's ``X-NFT-Proof`` is the one expected; takes the same time for all wrong ones."""
    return hmac.compare_digest(given.encode(errors="replace"), expected.encode())


class RequireKey:
    """ASGI middleware: 401 without a MAC under the key, or the key itself (``Authorization: Bearer <key>``)."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._credentials = Credentials(os.environ[KEY_VARIABLE], os.environ.get(SERVER_VARIABLE, ""))
        self._bearer = f"Bearer {self._credentials.key}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        given = dict(scope.get("headers", [])).get(b"authorization", b"")
        if scope["type"] == "lifespan" or hmac.compare_digest(given, self._bearer):
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif (proof := self._credentials.proof_for(given.decode("latin-1"), scope["method"], scope["path"])) is not None:
            await self._app(scope, receive, _proving(send, proof))
        else:
            await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"wrong or missing key"})


def _proving(send: Send, proof: str) -> Send:
    """``send``, which adds the proof to the head of the reply."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            header = (PROOF_HEADER.lower().encode(), proof.encode())
            message = {**message, "headers": [*message.get("headers", []), header]}
        await send(message)

    return sending
