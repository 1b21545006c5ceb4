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
  takes less than half the time of a single regular expression. Most of the rest is HTTP.

What a server sends is not believed: the bytes of a stream and the tokens of an answer are bounded as they arrive, and a whole
answer must be one to its request (``answer_rule.py``) before it counts.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

import aiohttp
import msgspec
import numpy as np

from nft_megatron.base.records import Completion, Request, Sampling
from nft_megatron.rollout.fleet.access import Credentials
from nft_megatron.rollout.fleet.session import HTTP_ERRORS, ServerFault, excerpt, open_reply, read_up_to, read_version

if TYPE_CHECKING:
    from nft_megatron.rollout.answer_rule import AnswerRule
    from nft_megatron.rollout.fleet.partial import PartialAnswer

STREAM_INTERVAL = 256
"""Most tokens of an answer between two signs of life. Fewer mean more work for the client and fewer tokens wasted uncounted."""

_ROUTE = "/inference/v1/generate"
_TOKEN_BYTES, _ANSWER_BYTES = 1024, 1 << 16
"""Most that a stream may have for a token and for an answer beyond its tokens; vLLM 0.32.0 sends 142 and about 600."""


class Refused(Exception):
    """A server rejects the request as invalid."""


@dataclass(frozen=True, eq=False)
class Progress:
    """Answer ``index`` has grown by ``tokens`` (int32) with ``logprobs`` (float64)."""

    index: int
    tokens: np.ndarray
    logprobs: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished answer, which is one to its request. ``versions``: of the weights behind its tokens, in order.

    They are empty unless the server names the weights of every token, and leave out those of a partial answer. The completion's
    own version is the oldest of all.
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
    error: msgspec.Raw = msgspec.Raw(b"null")


_DECODER = msgspec.json.Decoder(_Event)


@dataclass
class _Partial:
    """What has arrived of an answer."""

    tokens: list[np.ndarray] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)
    num_tokens: int = 0


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


async def generate(
    session: aiohttp.ClientSession,
    url: str,
    credentials: Credentials,
    body: bytes,
    request: Request,
    indices: Sequence[int],
    rule: AnswerRule,
    partial: PartialAnswer | None = None,
) -> AsyncGenerator[Progress | Finished, None]:
    """Yield the answers to ``body`` as they finish, and their progress in between.

    The server's answer i is answer ``indices[i]`` of ``request``. ``partial``: the beginning of the only one; ``body`` has it
    after the prompt. There is no deadline here: the caller watches the time and closes the iterator. Raises ``ServerFault`` if
    the server does not finish all answers, for whatever reason, or sends one that breaks ``rule``, and ``Refused`` if it
    rejects the request as invalid.
    """
    started = time.monotonic()
    unfinished: dict[int, _Partial] = {index: _Partial() for index in range(len(indices))}
    num_before = 0
    if partial is not None:
        assert len(indices) == 1, "only one answer continues"
        num_before = len(partial.tokens)
        unfinished[0] = _Partial([partial.tokens], [partial.logprobs], num_before)
    max_bytes = len(indices) * (_ANSWER_BYTES + rule.max_tokens * _TOKEN_BYTES)
    try:
        async with open_reply(session, "POST", url, _ROUTE, credentials, body) as reply:
            if reply.status != 200:
                problem = f"{reply.status} {excerpt(await read_up_to(reply, 500))}"
                if reply.status in (400, 404, 422):
                    raise Refused(problem)
                raise ServerFault(problem, is_unavailable=reply.status == 503)
            async for event in _events(reply, max_bytes):
                choice, tokens, logprobs = _parse(event)
                answer = unfinished.get(choice.index)
                if answer is None:
                    raise ServerFault(f"sent answer {choice.index}, which was not requested or had ended")
                if not len(tokens) and choice.finish_reason is None:
                    raise ServerFault("sent an event without tokens")
                answer.tokens.append(tokens)
                answer.logprobs.append(logprobs)
                answer.num_tokens += len(tokens)
                if answer.num_tokens > rule.max_tokens:
                    raise ServerFault(f"sent an answer of more than {rule.max_tokens} tokens")
                yield Progress(indices[choice.index], tokens, logprobs)
                if (reason := choice.finish_reason) is not None:
                    if reason == "abort":
                        raise ServerFault("ended an answer with 'abort'", is_abort=True)
                    tokens, logprobs = np.concatenate(answer.tokens), np.concatenate(answer.logprobs)
                    if (problem_found := rule.problem(tokens, logprobs, reason, request.prompt_tokens)) is not None:
                        raise ServerFault(problem_found)
                    del unfinished[choice.index]
                    versions = _versions(choice.weight_versions or [], len(tokens) - num_before)
                    all_versions = versions if partial is None else (partial.version, *versions)
                    completion = Completion(
                        request.request_id,
                        indices[choice.index],
                        tokens,
                        logprobs.astype(np.float32),
                        cast('Literal["stop", "length"]', reason),
                        min(all_versions, default=-1),
                        seconds=time.monotonic() - started,
                    )
                    yield Finished(completion, versions)
    except HTTP_ERRORS as error:
        raise ServerFault(excerpt(f"{type(error).__name__}: {error}"), is_cut=True) from error
    if unfinished:
        raise ServerFault(f"closed the connection with {len(unfinished)} of {len(indices)} answers unfinished", is_cut=True)


def _versions(spans: Sequence[_Span], num_tokens: int) -> tuple[int, ...]:
    """The versions of the spans if these cover all tokens, else none. ``ServerFault`` for weights that no step published."""
    ends = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != ends[:-1] or ends[-1] != num_tokens:
        return ()
    versions = []
    for span in spans:
        if (version := read_version(span.version)) is None:
            raise ServerFault(f"answered with weights of version {excerpt(span.version)}, which no step has published")
        versions.append(version)
    return tuple(versions)


async def _events(reply: aiohttp.ClientResponse, max_bytes: int) -> AsyncIterator[bytes]:
    """The ``data`` of each server-sent event except the last, ``[DONE]``. ``ServerFault`` after ``max_bytes``."""
    rest, num_bytes = bytearray(), 0
    async for received in reply.content.iter_any():
        num_bytes += len(received)
        if num_bytes > max_bytes:
            raise ServerFault(f"sent more than {max_bytes:,} bytes for one request")
        start = max(0, len(rest) - 1)
        rest += received
        if rest.find(b"\n\n", start) < 0:
            continue
        *lines, last = bytes(rest).split(b"\n\n")
        rest = bytearray(last)
        for line in lines:
            if line != b"data: [DONE]":
                yield line.removeprefix(b"data: ")


def _parse(data: bytes) -> tuple[_Choice, np.ndarray, np.ndarray]:
    """An event's choice (it has exactly one), its tokens (int32) and their log-probs (float64)."""
    try:
        event = _DECODER.decode(data)
        if bytes(event.error) != b"null":
            raise ServerFault(f"reports {excerpt(bytes(event.error))}", is_cut=True)
        (choice,) = event.choices
        logprobs = np.array([token.logprob for token in choice.logprobs.content], dtype=np.float64)
        return choice, np.array(choice.token_ids, dtype=np.int32), logprobs
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise ServerFault(f"sent something that is not an answer ({excerpt(str(error))}): {excerpt(data)}") from error
