"""A grader behind HTTP, ``verify.url``: what a worker process is for other modes, without a process of its own.

    POST URL  {"answer", "gold", "question"}  ->  200 {"verdict": "correct" | "wrong" | "unknown"}

It has ``seconds`` for one answer, with all attempts: after a connection that fails and after a status of 429 or 5xx it tries
again. What is still without a reply then is *unknown*, "no reply"; any other reply is *unknown*, "no verdict".
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import aiohttp

from nft_megatron.base.backoff import Backoff
from nft_megatron.base.records import Verdict
from nft_megatron.base.untrusted import parse_json
from nft_megatron.verify.comparison import Undecided
from nft_megatron.verify.reasons import verdict
from nft_megatron.verify.worker import reason_of_label

_MOST_BYTES = 1 << 16
_MOST_SHOWN = 200
_BUSY = 429


class HttpGrader:
    """One thread's client of the service at ``url``. ``kill`` may be called from another thread."""

    num_tasks = 0

    def __init__(self, url: str) -> None:
        self._url = url
        self.is_alive = True
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[tuple[str, str]]] | None = None

    def judge(self, task: Undecided, seconds: float) -> Verdict:
        """The verdict, with an empty ``verifier``, within ``seconds``."""
        started = time.monotonic()
        loop = asyncio.new_event_loop()  # asyncio.run would wait without a deadline for a name lookup that was given up
        try:
            asking = loop.create_task(self._ask(task, seconds))
            self._running = loop, asking
            if not self.is_alive:
                asking.cancel()
            reason, detail = loop.run_until_complete(asking)
        except asyncio.CancelledError:
            reason, detail = "verifier closed", ""
        finally:
            self._running = None
            loop.close()
        return verdict(reason, "", detail=detail, seconds=time.monotonic() - started)

    def kill(self) -> None:
        """Give up the pending :meth:`judge`, which returns *unknown*."""
        self.is_alive = False
        if running := self._running:
            with contextlib.suppress(RuntimeError):  # it has just ended
                running[0].call_soon_threadsafe(running[1].cancel)

    close = kill

    async def _ask(self, task: Undecided, seconds: float) -> tuple[str, str]:
        body = {"answer": task.text, "gold": task.gold, "question": task.question}
        backoff, problem = Backoff(first=0.1, longest=2.0), ""
        try:
            async with (
                asyncio.timeout(seconds),
                aiohttp.ClientSession(
                    timeout=aiohttp.ClientTimeout(total=None), cookie_jar=aiohttp.DummyCookieJar()
                ) as session,
            ):
                while True:
                    try:
                        status, received = await self._post(session, body)
                    except (aiohttp.ClientError, OSError) as error:
                        problem = f"{type(error).__name__}: {error}"[:_MOST_SHOWN]
                    else:
                        if status != _BUSY and status < 500:
                            return _reason_of(status, received)
                        problem = f"status {status}"
                    await asyncio.sleep(backoff.next_delay())
        except TimeoutError:
            return "no reply", problem

    async def _post(self, session: aiohttp.ClientSession, body: dict[str, str]) -> tuple[int, bytes]:
        async with session.post(self._url, json=body, allow_redirects=False) as reply:
            received = b""
            while len(received) <= _MOST_BYTES and (more := await reply.content.read(_MOST_BYTES)):
                received += more
            return reply.status, received


def _reason_of(status: int, received: bytes) -> tuple[str, str]:
    """Reason and detail for a reply.

    >>> _reason_of(200, b'{"verdict": "wrong"}'), _reason_of(404, b"")
    (('rejected', ''), ('no verdict', 'status 404'))
    """
    if status != 200:
        return "no verdict", f"status {status}"
    if len(received) > _MOST_BYTES:
        return "no verdict", f"more than {_MOST_BYTES} bytes"
    try:
        reply: Any = parse_json(received)
        label = reply["verdict"]
    except (ValueError, KeyError, TypeError):
        return "no verdict", repr(received)[:_MOST_SHOWN]
    return reason_of_label(label) if isinstance(label, str) else ("no verdict", repr(label)[:_MOST_SHOWN])
