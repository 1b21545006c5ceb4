"""HTTP to a server that may be anyone: who answers is checked first, and only so much of it is read.

A reply is believed if it comes from the server that was started (``access.py``), from the address that was asked (no redirect
is followed) and uncompressed, so that no more arrives than was sent. aiohttp bounds a reply's head, its reader the body.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator

import aiohttp

from nft_megatron.rollout.fleet.access import PROOF_HEADER, Credentials, is_proof

_CONNECT_SECONDS = 30.0
_IDLE_SECONDS = 2.0  # servers close connections after 5 idle seconds; reusing one at that moment would look like a fault
_EXCERPT = 300  # characters
_VERSION = re.compile(r"[0-9]{1,15}")


class ServerFault(Exception):
    """A server did not do what it was asked.

    ``is_abort``: the request was aborted; the server is not at fault. ``is_unavailable``: it takes no request now (503), as
    vLLM 0.33 answers from ``/pause?mode=wait`` to ``/resume``. ``is_cut``: it stopped answering; what it sent before counts.
    """

    def __init__(self, reason: str, is_abort: bool = False, is_unavailable: bool = False, is_cut: bool = False) -> None:
        super().__init__(reason)
        self.is_abort, self.is_unavailable, self.is_cut = is_abort, is_unavailable, is_cut


HTTP_ERRORS = (aiohttp.ClientError, OSError, ValueError, RuntimeError)
"""What aiohttp raises for a broken connection and for what is not HTTP; RuntimeError: a connection that closed unnoticed."""


def open_session(connect_seconds: float = _CONNECT_SECONDS) -> aiohttp.ClientSession:
    """A session for one server, with one connection per request. Open it in the event loop that uses it.

    Only connecting has a deadline: how long a reply may take depends on what was asked.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        headers={"Accept-Encoding": "identity"},
    )


@contextlib.asynccontextmanager
async def open_reply(
    session: aiohttp.ClientSession, method: str, url: str, target: str, credentials: Credentials, body: bytes | None = None
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Send a request and yield the reply, of which only the head has been read. ``target``: path and query.

    Raises ``ServerFault`` for a reply that is not to be believed; aiohttp's own errors are ``HTTP_ERRORS``.
    """
    authorization, proof = credentials.authorize(method, target.partition("?")[0])
    headers = {"Authorization": authorization} | ({} if body is None else {"Content-Type": "application/json"})
    async with session.request(method, url + target, data=body, headers=headers, allow_redirects=False) as reply:
        if proof is not None and not is_proof(reply.headers.get(PROOF_HEADER, ""), proof):
            text = "without proof that it is the server that was started: another process may have its port"
            raise ServerFault(f"answered {reply.status} {text}")
        if (encoding := reply.headers.get("Content-Encoding", "identity")) != "identity":
            raise ServerFault(f"compressed its reply ({excerpt(encoding)}), although it was asked not to")
        yield reply


async def read_up_to(reply: aiohttp.ClientResponse, num_bytes: int) -> bytes:
    """The reply's body, or its first ``num_bytes``."""
    body = bytearray()
    while len(body) < num_bytes and (part := await reply.content.read(num_bytes - len(body))):
        body += part
    return bytes(body)


def read_version(label: str) -> int | None:
    """The version that a label names; None for vLLM's own label and all others that no step gives.

    >>> read_version("12"), read_version("default"), read_version("-3"), read_version("٣")
    (12, None, None, None)
    """
    return int(label) if _VERSION.fullmatch(label) else None


def excerpt(data: bytes | str) -> str:
    """The beginning of what a server sent, for a message: one line, nothing that moves a terminal's cursor.

    >>> excerpt(b'{"error": "no\\n\\x1b[2Jsuch route"}')
    '{"error": "no  [2Jsuch route"}'
    """
    text = data[: 4 * _EXCERPT].decode(errors="replace") if isinstance(data, bytes) else data
    return "".join(character if character.isprintable() else " " for character in text[:_EXCERPT])
