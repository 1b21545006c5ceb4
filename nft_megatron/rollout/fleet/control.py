"""The control routes of one vLLM server. Failures raise a ``ControlError`` that names the route.

Every call has one deadline for all of it, however slowly a server sends, and reads so much of a reply and no more.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlencode

import msgspec

from nft_megatron.rollout.fleet.access import Credentials
from nft_megatron.rollout.fleet.session import (
    HTTP_ERRORS,
    ServerFault,
    excerpt,
    open_reply,
    open_session,
    read_up_to,
    read_version,
)

MODEL_NAME = "policy"
"""The name under which every server knows the model."""

T = TypeVar("T")
InFlight = Literal["finish", "continue"]

_PAUSE_MODES: dict[InFlight, str] = {"finish": "wait", "continue": "keep"}
_CANARY_TOKENS = 8
_MAX_REPLY_BYTES = 4 << 20  # the longest names every tensor of a model, once for each worker


# The parts of replies that are read.
class _WeightInfo(msgspec.Struct):
    weight_version: str


class _WorldSize(msgspec.Struct):
    world_size: Annotated[int, msgspec.Meta(ge=1, le=65536)]


class _Success(msgspec.Struct):
    success: bool


class _Fingerprint(msgspec.Struct):
    fingerprint: str


class _Fingerprints(msgspec.Struct):
    results: list[_Fingerprint]


class _Wrong(msgspec.Struct):
    wrong: list[str]


class _WrongTensors(msgspec.Struct):
    results: list[_Wrong]


class _Logprob(msgspec.Struct):
    logprob: float


class _Scored(msgspec.Struct):
    prompt_logprobs: list[dict[str, _Logprob] | None]


class _Canary(msgspec.Struct):
    choices: list[_Scored]


_Anything = msgspec.Raw  # the status says it all


class ControlError(RuntimeError):
    """A control call failed. ``silent``: the server did not answer in time, or at all."""

    def __init__(self, message: str, silent: bool = False) -> None:
        super().__init__(message)
        self.silent = silent


class Control:
    """Blocking calls to one server, from any thread. Each has its own connection, so a broken one never outlives its call.

    ``seconds`` limits short calls; calls that move weights or wait for answers take their own limit. ``server_id``: see
    ``access.Credentials``.
    """

    def __init__(self, url: str, api_key: str, seconds: float = 10.0, server_id: str | None = None) -> None:
        self.url, self._seconds = url, seconds
        self._credentials = Credentials(api_key, server_id)

    def version(self, seconds: float | None = None) -> int | None:
        """The version of the weights that the server reports; None: none of ours. Also proves that its engine responds."""
        return read_version(self._get("/weight_info", _WeightInfo, seconds).weight_version)

    def num_workers(self) -> int:
        """The number of worker processes, which each hold the weights or a shard of them."""
        return self._get("/get_world_size", _WorldSize).world_size

    def pause(self, in_flight: InFlight, seconds: float) -> None:
        """Stop generating: after the requests in progress (``finish``), or between two of their tokens (``continue``)."""
        self._post(f"/pause?{urlencode({'mode': _PAUSE_MODES[in_flight]})}", _Anything, seconds=seconds)

    def resume(self) -> None:
        self._post("/resume", _Anything)

    def reset_prefix_cache(self) -> None:
        """Discard all keys and values of older weights; requests in progress recompute theirs."""
        if not self._post("/reset_prefix_cache?reset_running_requests=true", _Success).success:
            raise ControlError(f"{self.url} did not reset its prefix cache")

    def join(self, host: str, port: int, first_rank: int, num_ranks: int, seconds: float) -> None:
        """Make its workers join the trainer's group; return when the group is complete."""
        info = {"host": host, "port": port, "first_rank": first_rank, "num_ranks": num_ranks, "seconds": seconds}
        self._post("/init_weight_transfer_engine", _Anything, {"init_info": info}, seconds=seconds)

    def start_update(self, seconds: float) -> None:
        """Start a weight update, discarding any that failed halfway."""
        self._rpc("nft_abort_update", seconds, _Anything)
        self._post("/start_weight_update", _Anything, seconds=seconds)

    def update(self, info: dict[str, Any], seconds: float) -> None:
        """Load a folder or a bucket; see ``worker_extension.UpdateInfo``."""
        self._post("/update_weights", _Anything, {"update_info": info}, seconds=seconds)

    def finish_update(self, version: int, seconds: float) -> None:
        self._post("/finish_weight_update", _Anything, {"weight_version": str(version)}, seconds=seconds)

    def fingerprints(self, seconds: float) -> list[str]:
        """The fingerprint of what each of its workers loaded in the last update."""
        return [result.fingerprint for result in self._rpc("nft_fingerprint", seconds, _Fingerprints).results]

    def wrong_tensors(self, seconds: float) -> list[str]:
        """Names of the tensors whose values in the model differ from the last update's."""
        results = self._rpc("nft_compare_model", seconds, _WrongTensors).results
        return sorted({name for result in results for name in result.wrong})

    def canary(self, vocab_size: int, seconds: float) -> list[float]:
        """Log-probs of the tokens of a fixed short sequence: shows that the weights work, not only that they arrived."""
        tokens = [(7 * position + 1) % vocab_size for position in range(_CANARY_TOKENS)]
        body = {
            "model": MODEL_NAME,
            "prompt": tokens,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
            "detokenize": False,
        }
        path = "/v1/completions"
        answer = self._post(path, _Canary, body, seconds)
        try:
            (choice,) = answer.choices
            pairs = zip(tokens[1:], choice.prompt_logprobs[1:], strict=True)
            return [(logprobs or {})[str(token)].logprob for token, logprobs in pairs]
        except (LookupError, ValueError) as error:
            raise ControlError(f"{self.url}{path} sent an unexpected reply ({error!r})") from error

    def _rpc(self, method: str, seconds: float, reply: type[T]) -> T:
        return self._post("/collective_rpc", reply, {"method": method, "timeout": seconds}, seconds)

    def _get(self, target: str, reply: type[T], seconds: float | None = None) -> T:
        return self._call("GET", target, None, reply, seconds)

    def _post(self, target: str, reply: type[T], body: dict[str, Any] | None = None, seconds: float | None = None) -> T:
        return self._call("POST", target, body, reply, seconds)

    def _call(self, method: str, target: str, body: dict[str, Any] | None, reply: type[T], seconds: float | None) -> T:
        """The reply's JSON as a ``reply``."""
        deadline = self._seconds if seconds is None else seconds
        path = f"{self.url}{target.partition('?')[0]}"
        data = None if body is None else json.dumps(body).encode()
        try:
            status, received = _run(self._exchange(method, target, data, deadline))
        except TimeoutError as error:
            raise ControlError(f"{path} did not answer within {deadline:g} s", silent=True) from error
        except HTTP_ERRORS as error:
            raise ControlError(f"{path}: {excerpt(f'{type(error).__name__}: {error}')}", silent=True) from error
        except ServerFault as fault:
            raise ControlError(f"{path} {fault}") from fault
        if status != 200:
            raise ControlError(f"{path} answered {status}: {excerpt(received)}")
        try:
            return msgspec.json.decode(received, type=reply)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            text = f"{path} sent an unexpected reply ({excerpt(str(error))}): {excerpt(received)}"
            raise ControlError(text) from error

    async def _exchange(self, method: str, target: str, body: bytes | None, seconds: float) -> tuple[int, bytes]:
        """Status and body of a reply."""
        async with (
            asyncio.timeout(seconds),
            open_session(min(seconds, self._seconds)) as session,
            open_reply(session, method, self.url, target, self._credentials, body) as reply,
        ):
            if reply.status != 200:
                return reply.status, await read_up_to(reply, 500)
            received = await read_up_to(reply, _MAX_REPLY_BYTES + 1)
            if len(received) > _MAX_REPLY_BYTES:
                raise ServerFault(f"sent a reply of more than {_MAX_REPLY_BYTES:,} bytes")
            return reply.status, received


def _run(exchange: Coroutine[Any, Any, T]) -> T:
    """Run it in a loop of its own. ``asyncio.run`` would wait, without a deadline, for a name lookup that was given up."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(exchange)
    finally:
        loop.close()
