"""One HTTP request to a vLLM server: sends token ids, streams back token ids with exact log-probs.

The route is ``/inference/v1/generate`` (``--enable-scale-out``), the only one that says which weights each token came from; the
server runs with ``--logprobs-mode processed_logprobs``. Learned from reading and running vLLM 0.32.0:

* Answer i of a request with ``n`` answers and seed s is, up to the rounding of logits, the answer of a separate request with
  seed s + i. So answers with neighbouring seeds share one request, and any answer can be requested again alone.
* ``stream_interval`` makes a stream cheap: one event for the first token, one per interval, one for the end. The stream gives
  signs of life, each answer as it ends, and the number of tokens that an abort wastes.
* ``ignore_eos`` makes ``stop_token_ids`` alone end an answer; otherwise the model folder's end-of-text tokens would too.
* After each token the decoded answer is searched for stop texts; the tokens of a stop text are kept.
* Closing a request's connection aborts it.
* Most of a client's work is reading log-probs, 140 bytes per token. Typed decoding (msgspec) skips what it does not need and
  takes less than half the time of a single regular expression. Most of the rest is HTTP: aiohttp takes half as long per token
  as httpx, which the blocking calls use.
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
"""Most tokens of an answer between two signs of life. Fewer mean more work for the client and fewer tokens wasted uncounted."""

_ROUTE = "/inference/v1/generate"
_CONNECT_SECONDS = 30.0
_IDLE_SECONDS = 2.0  # servers close connections after 5 idle seconds; reusing one at that moment would look like a fault
_NO_LOGPROB = -9999.0  # vLLM sends this for a log-prob that is missing, NaN or -inf


class ServerFault(Exception):
    """A server did not finish a request. ``is_abort``: the request was aborted; the server is not at fault."""

    def __init__(self, reason: str, is_abort: bool = False) -> None:
        super().__init__(reason)
        self.is_abort = is_abort


class Refused(Exception):
    """A server rejects the request as invalid: retrying it, on any server, is useless."""


@dataclass(frozen=True)
class Progress:
    """Answer ``index`` has grown by ``num_tokens``."""

    index: int
    num_tokens: int


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished answer. ``versions``: of the weights behind its tokens, in order.

    They are empty unless the server names the weights of every token. The completion's own version is the oldest of them.
    """

    completion: Completion
    versions: tuple[int, ...]


# The parts of an event that are read; the rest is skipped. gc=False: these records form no reference cycles.
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

    It sets every parameter that affects the distribution, so that no server default can.
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
    """The indices of ``seeds``, split into runs of consecutive seeds.

    >>> runs_of_seeds((7, 8, 9, 3, 4))
    [range(0, 3), range(3, 5)]
    """
    if not seeds:
        return []
    starts = [i for i in range(len(seeds)) if i == 0 or seeds[i] != seeds[i - 1] + 1]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(seeds)], strict=True)]


def open_session() -> aiohttp.ClientSession:
    """A session for one server, with one connection per request. Open it in the event loop that uses it.

    Only connecting has a deadline. Silence is judged per server, since one answer may wait long in a server's queue.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def generate(
    session: aiohttp.ClientSession, url: str, headers: dict[str, str], body: bytes, request_id: int, indices: Sequence[int]
) -> AsyncGenerator[Progress | Finished, None]:
    """Yield the answers to ``body`` as they finish, and their progress in between.

    The server's answer i is answer ``indices[i]`` of request ``request_id``. There is no deadline here: the caller watches the
    time and closes the iterator. Raises ``ServerFault`` if the server does not finish all answers, for whatever reason, and
    ``Refused`` if it rejects the request as invalid.
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
                    raise ServerFault(f"sent answer {choice.index}, which was not requested or had ended")
                if len(tokens) != len(logprobs) or not ((logprobs <= 0) & (logprobs > _NO_LOGPROB)).all():
                    raise ServerFault("sent a token without a log-prob: its logits are not finite, or it is misconfigured")
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
    except (aiohttp.ClientError, RuntimeError) as error:  # RuntimeError: from aiohttp, for a connection closed unnoticed
        raise ServerFault(f"{type(error).__name__}: {error}") from error
    if unfinished:
        raise ServerFault(f"closed the connection with {len(unfinished)} of {len(indices)} answers unfinished")


def _versions(spans: Sequence[_Span], num_tokens: int) -> tuple[int, ...]:
    """The versions of the spans if these cover all tokens, else none. ``ServerFault`` for weights that no step published."""
    ends = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != ends[:-1] or ends[-1] != num_tokens:
        return ()
    for span in spans:
        if not span.version.isdecimal():
            raise ServerFault(f"answered with weights of version {span.version}, which no step has published")
    return tuple(int(span.version) for span in spans)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The ``data`` of each server-sent event except the last, ``[DONE]``."""
    rest = b""
    async for received in response.content.iter_any():
        *lines, rest = (rest + received).split(b"\n\n")
        for line in lines:
            if line != b"data: [DONE]":
                yield line.removeprefix(b"data: ")


def _parse(data: bytes) -> tuple[_Choice, np.ndarray, np.ndarray]:
    """An event's choice (it has exactly one), its tokens (int32) and their log-probs (float32)."""
    try:
        event = _DECODER.decode(data)
        if event.error is not None:
            raise ServerFault(f"reports {event.error}")
        (choice,) = event.choices
        logprobs = np.array([token.logprob for token in choice.logprobs.content], dtype=np.float32)
        return choice, np.array(choice.token_ids, dtype=np.int32), logprobs
    except (msgspec.MsgspecError, ValueError, OverflowError) as error:
        raise ServerFault(f"sent something that is not an answer ({error}): {data[:200].decode(errors='replace')}") from error
