"""One HTTP request to a vLLM server: token ids out, token ids with exact log-probs in, as a stream.

The route is ``/inference/v1/generate`` (``--enable-scale-out``), the only one that says which weights each token came from; the
server runs with ``--logprobs-mode processed_logprobs``. Found by reading and running vLLM 0.32.0:

* Answer i of a request with ``n`` answers and the seed s is, but for the rounding of logits, the answer of a request of its own
  with the seed s + i: so answers with neighbouring seeds share one request, and every answer can be had again by itself.
* ``stream_interval`` makes a stream cheap: the first token at once, then an event every so many tokens, then the end. What a
  stream buys: signs of life, each answer as it ends, and the count of tokens that an abort wastes.
* ``ignore_eos`` leaves the end to ``stop_token_ids``: otherwise the end-of-text tokens of the model folder would count too.
* A stop text is looked for in the decoded answer after each token; the tokens that make it up are kept.
* Aborting a request is closing its connection.
* Most of a client's work is reading log-probs, 140 bytes a token. Typed decoding (msgspec) skips what it does not need, in less
  than half the time of one regular expression over it. Most of the rest is HTTP: aiohttp takes half as long per token as httpx,
  which the blocking calls use.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import aiohttp
import msgspec
import numpy as np

from nft_megatron.base.records import Completion, Sampling

STREAM_INTERVAL = 256
"""Most tokens of an answer between two signs of life. With fewer a client works more, and fewer are wasted uncounted."""

_ROUTE = "/inference/v1/generate"
_CONNECT_SECONDS = 30.0
_IDLE_SECONDS = 2.0  # a server closes connections that are idle for 5 s; one that it closes just then would look like a fault
_NO_LOGPROB = -9999.0  # what vLLM sends for a log-prob that it does not have, or that is NaN or -inf


class ServerFault(Exception):
    """A server did not finish what it was asked. ``is_abort``: on somebody's order, not by a fault of its own."""

    def __init__(self, reason: str, is_abort: bool = False) -> None:
        super().__init__(reason)
        self.is_abort = is_abort


class Refused(Exception):
    """A server calls the request wrong: asking again, here or elsewhere, is useless."""


@dataclass(frozen=True)
class Progress:
    """Answer ``index`` has ``num_tokens`` more."""

    index: int
    num_tokens: int


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished answer. ``versions``: of the weights of its tokens, in order.

    Empty where the server does not say of each token where it comes from. The completion's own version is the oldest.
    """

    completion: Completion
    versions: tuple[int, ...]


# What is read of an event; the rest of it is skipped. No record here refers back: the garbage collector need not look at them.
class _Token(msgspec.Struct, gc=False):
    logprob: float


class _Logprobs(msgspec.Struct, gc=False):
    content: list[_Token]


class _Span(msgspec.Struct, gc=False):
    version: str
    start: int
    end: int


class _Choice(msgspec.Struct, gc=False):
    index: int
    finish_reason: str | None
    token_ids: list[int]
    weight_versions: list[_Span] | None
    logprobs: _Logprobs


class _Event(msgspec.Struct, gc=False):
    choices: list[_Choice] = []
    error: Any = None


_DECODER = msgspec.json.Decoder(_Event)


def make_body(
    prompt_tokens: np.ndarray, seed: int, num_answers: int, sampling: Sampling, stream_interval: int = STREAM_INTERVAL
) -> bytes:
    """The request for ``num_answers`` answers to one prompt, with the seeds ``seed``, ``seed`` + 1 …

    Every parameter that changes the distribution is set, so that no default of a server can.
    """
    parameters = {
        "n": num_answers,
        "seed": seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": sampling.max_tokens,
        "min_tokens": 0,
        "ignore_eos": True,
        "stop_token_ids": list(sampling.stop_token_ids),
        "stop": list(sampling.stop),
        "detokenize": bool(sampling.stop),
        "skip_special_tokens": False,
        "logprobs": 0,
        "stream_interval": stream_interval,
    }
    return json.dumps({"token_ids": prompt_tokens.tolist(), "sampling_params": parameters, "stream": True}).encode()


def runs_of_seeds(seeds: Sequence[int]) -> list[range]:
    """Indices of ``seeds`` as runs in which each seed is one more than the one before.

    >>> runs_of_seeds((7, 8, 9, 3, 4))
    [range(0, 3), range(3, 5)]
    """
    if not seeds:
        return []
    starts = [i for i in range(len(seeds)) if i == 0 or seeds[i] != seeds[i - 1] + 1]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(seeds)], strict=True)]


def open_session() -> aiohttp.ClientSession:
    """Connections to a server, as many as there are requests: one session a server, opened in the event loop that uses it.

    Only connecting has a deadline. Silence is watched for a server as a whole, as an answer may wait in its queue for long.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def generate(
    session: aiohttp.ClientSession, url: str, headers: dict[str, str], body: bytes, request_id: int, indices: Sequence[int]
) -> AsyncGenerator[Progress | Finished, None]:
    """Yield the answers to ``body`` as they finish, and what they have grown by in between.

    The server's answer i is answer ``indices[i]`` of request ``request_id``. There is no deadline here: whoever iterates
    watches the time and closes. Raises ``ServerFault`` where the server does not finish all of them, for whatever reason, and
    ``Refused`` where it calls the request wrong.
    """
    started = time.monotonic()
    unfinished: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {index: [] for index in range(len(indices))}
    try:
        headers = {**headers, "Content-Type": "application/json"}
        async with session.post(url + _ROUTE, data=body, headers=headers) as response:
            if response.status != 200:
                problem = f"{response.status} {(await response.read())[:500].decode(errors='replace')}"
                raise Refused(problem) if response.status in (400, 404, 422) else ServerFault(problem)
            async for event in _events(response):
                choice, tokens, logprobs = _parse(event)
                if choice.index not in unfinished:
                    raise ServerFault(f"sent answer {choice.index}, which was not asked for or had ended")
                if len(tokens) != len(logprobs) or not ((logprobs <= 0) & (logprobs > _NO_LOGPROB)).all():
                    raise ServerFault("sent a token without a log-prob: its logits are not finite, or it is set up wrongly")
                unfinished[choice.index].append((tokens, logprobs))
                yield Progress(indices[choice.index], len(tokens))
                if (reason := choice.finish_reason) is not None:
                    if reason not in ("stop", "length"):
                        raise ServerFault(f"ended an answer with {reason!r}", is_abort=reason == "abort")
                    tokens, logprobs = map(np.concatenate, zip(*unfinished.pop(choice.index), strict=True))
                    versions = _versions(choice.weight_versions or [], len(tokens))
                    completion = Completion(
                        request_id,
                        indices[choice.index],
                        tokens,
                        logprobs,
                        cast('Literal["stop", "length"]', reason),
                        min(versions, default=-1),
                        seconds=time.monotonic() - started,
                    )
                    yield Finished(completion, versions)
    except (aiohttp.ClientError, RuntimeError) as error:  # RuntimeError: aiohttp, of a connection that ended unseen
        raise ServerFault(f"{type(error).__name__}: {error}") from error
    if unfinished:
        raise ServerFault(f"ended the connection with {len(unfinished)} of {len(indices)} answers unfinished")


def _versions(spans: Sequence[_Span], num_tokens: int) -> tuple[int, ...]:
    """The versions of spans that together cover all tokens, else none. ``ServerFault`` for weights that we never published."""
    ends = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != ends[:-1] or ends[-1] != num_tokens:
        return ()
    for span in spans:
        if not span.version.isdecimal():
            raise ServerFault(f"answered with weights of version {span.version}, which no step has published")
    return tuple(int(span.version) for span in spans)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The ``data`` of each server-sent event but the closing one."""
    rest = b""
    async for received in response.content.iter_any():
        *lines, rest = (rest + received).split(b"\n\n")
        for line in lines:
            if line != b"data: [DONE]":
                yield line.removeprefix(b"data: ")


def _parse(data: bytes) -> tuple[_Choice, np.ndarray, np.ndarray]:
    """An event's choice, one answer's news; its tokens (int32) and their log-probs (float32)."""
    try:
        event = _DECODER.decode(data)
        if event.error is not None:
            raise ServerFault(f"reports {event.error}")
        (choice,) = event.choices
        logprobs = np.array([token.logprob for token in choice.logprobs.content], dtype=np.float32)
        return choice, np.array(choice.token_ids, dtype=np.int32), logprobs
    except (msgspec.MsgspecError, ValueError, OverflowError) as error:
        raise ServerFault(f"sent what is not an answer ({error}): {data[:200].decode(errors='replace')}") from error
