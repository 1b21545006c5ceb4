"""The control routes of one vLLM server. Every call has a deadline; what goes wrong is a ``ControlError`` that says where."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import httpx

from nft_megatron.rollout.fleet.server import MODEL_NAME

T = TypeVar("T")
InFlight = Literal["finish", "continue"]

_PAUSE_MODES: dict[InFlight, str] = {"finish": "wait", "continue": "keep"}
_CANARY_TOKENS = 8
_TLS = ssl.create_default_context()  # once: making it takes longer than most calls


def _nothing(_: Any) -> Any:
    """Reads an answer that says no more than that all went well."""


class ControlError(RuntimeError):
    """A server did not do what it was told. ``silent``: it gave no answer in time, or none at all."""

    def __init__(self, message: str, silent: bool = False) -> None:
        super().__init__(message)
        self.silent = silent


class Control:
    """Blocking calls to one server, from any thread, one connection a call: a broken one never outlives its call.

    ``seconds`` bounds short calls; those that move weights or wait for answers name their own.
    """

    def __init__(self, url: str, api_key: str, seconds: float = 10.0) -> None:
        self.url, self._seconds = url, seconds
        self._headers = {"Authorization": f"Bearer {api_key}"}

    def version(self, seconds: float | None = None) -> int | None:
        """The version of its weights by its own account; None: none of ours. Also proof that its engine process answers."""
        label = self._call("GET", "/weight_info", seconds=seconds, read=lambda answer: str(answer["weight_version"]))
        return int(label) if label.isdecimal() else None

    def num_workers(self) -> int:
        """Worker processes that each hold, or share, the weights."""
        return self._call("GET", "/get_world_size", read=lambda answer: int(answer["world_size"]))

    def pause(self, in_flight: InFlight, seconds: float) -> None:
        """Stop generating: after the requests in progress (``finish``), or between two of their tokens (``continue``)."""
        self._call("POST", "/pause", params={"mode": _PAUSE_MODES[in_flight]}, seconds=seconds)

    def resume(self) -> None:
        self._call("POST", "/resume")

    def reset_prefix_cache(self) -> None:
        """Forget every key and value of older weights; requests in progress compute theirs again."""
        params = {"reset_running_requests": "true"}
        if not self._call("POST", "/reset_prefix_cache", params=params, read=lambda answer: bool(answer["success"])):
            raise ControlError(f"{self.url} did not reset its prefix cache")

    def join(self, host: str, port: int, first_rank: int, num_ranks: int, seconds: float) -> None:
        """Make its workers join the trainer's group; returns when the group is whole."""
        info = {"host": host, "port": port, "first_rank": first_rank, "num_ranks": num_ranks, "seconds": seconds}
        self._call("POST", "/init_weight_transfer_engine", {"init_info": info}, seconds=seconds)

    def start_update(self, seconds: float) -> None:
        """Begin to take over weights; what an update that failed half-way left behind is discarded."""
        self._rpc("nft_abort_update", seconds)
        self._call("POST", "/start_weight_update", seconds=seconds)

    def update(self, info: dict[str, Any], seconds: float) -> None:
        """Take over a folder or a bucket; see ``worker_extension.UpdateInfo``."""
        self._call("POST", "/update_weights", {"update_info": info}, seconds=seconds)

    def finish_update(self, version: int, seconds: float) -> None:
        self._call("POST", "/finish_weight_update", {"weight_version": str(version)}, seconds=seconds)

    def fingerprints(self, seconds: float) -> list[str]:
        """What each of its workers took over in the last update."""
        return self._rpc("nft_fingerprint", seconds, lambda results: [str(result["fingerprint"]) for result in results])

    def wrong_tensors(self, seconds: float) -> list[str]:
        """Names of the tensors whose values in the model are not those of the last update."""
        return self._rpc(
            "nft_compare_model", seconds, lambda results: sorted({str(name) for result in results for name in result["wrong"]})
        )

    def canary(self, vocab_size: int, seconds: float) -> list[float]:
        """Log-probs of a fixed short text of token ids, given its beginning: how the weights work, not only what they are."""
        tokens = [(7 * position + 1) % vocab_size for position in range(_CANARY_TOKENS)]
        body = {
            "model": MODEL_NAME,
            "prompt": tokens,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
            "detokenize": False,
        }

        def read(answer: Any) -> list[float]:
            (choice,) = answer["choices"]
            pairs = zip(tokens[1:], choice["prompt_logprobs"][1:], strict=True)
            return [float(logprobs[str(token)]["logprob"]) for token, logprobs in pairs]

        return self._call("POST", "/v1/completions", body, seconds=seconds, read=read)

    def _rpc(self, method: str, seconds: float, read: Callable[[Any], T] = _nothing) -> T:
        """``read`` from the list of what each worker answers."""
        body = {"method": method, "timeout": seconds}
        return self._call("POST", "/collective_rpc", body, seconds=seconds, read=lambda answer: read(answer["results"]))

    def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        params: dict[str, str] | None = None,
        seconds: float | None = None,
        read: Callable[[Any], T] = _nothing,
    ) -> T:
        """What ``read`` makes of the answer."""
        deadline = self._seconds if seconds is None else seconds
        try:
            reply = httpx.request(
                method,
                f"{self.url}{path}",
                json=body,
                params=params,
                headers=self._headers,
                timeout=httpx.Timeout(deadline, connect=min(deadline, self._seconds)),
                trust_env=False,
                verify=_TLS,
            )
        except httpx.TimeoutException as error:
            raise ControlError(f"{self.url}{path} gave no answer within {deadline:g} s", silent=True) from error
        except httpx.HTTPError as error:
            raise ControlError(f"{self.url}{path}: {error}", silent=True) from error
        if reply.status_code != 200:
            raise ControlError(f"{self.url}{path} answered {reply.status_code}: {reply.text[:500]}")
        try:
            return read(reply.json())
        except (LookupError, TypeError, ValueError) as error:
            raise ControlError(f"{self.url}{path} answered in an unknown form ({error!r}): {reply.text[:500]}") from error
