"""The control routes of one vLLM server. Every call has a deadline; failures raise a ``ControlError`` that names the route."""

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
_TLS = ssl.create_default_context()  # created once: that takes longer than most calls


def _nothing(_: Any) -> Any:
    """For a reply without content: the status says it all."""


class ControlError(RuntimeError):
    """A control call failed. ``silent``: the server did not answer in time, or at all."""

    def __init__(self, message: str, silent: bool = False) -> None:
        super().__init__(message)
        self.silent = silent


class Control:
    """Blocking calls to one server, from any thread. Each has its own connection, so a broken one never outlives its call.

    ``seconds`` limits short calls; calls that move weights or wait for answers take their own limit.
    """

    def __init__(self, url: str, api_key: str, seconds: float = 10.0) -> None:
        self.url, self._seconds = url, seconds
        self._headers = {"Authorization": f"Bearer {api_key}"}

    def version(self, seconds: float | None = None) -> int | None:
        """The version of the weights that the server reports; None: none of ours. Also proves that its engine responds."""
        label = self._call("GET", "/weight_info", seconds=seconds, read=lambda answer: str(answer["weight_version"]))
        return int(label) if label.isdecimal() else None

    def num_workers(self) -> int:
        """The number of worker processes, which each hold the weights or a shard of them."""
        return self._call("GET", "/get_world_size", read=lambda answer: int(answer["world_size"]))

    def pause(self, in_flight: InFlight, seconds: float) -> None:
        """Stop generating: after the requests in progress (``finish``), or between two of their tokens (``continue``)."""
        self._call("POST", "/pause", params={"mode": _PAUSE_MODES[in_flight]}, seconds=seconds)

    def resume(self) -> None:
        self._call("POST", "/resume")

    def reset_prefix_cache(self) -> None:
        """Discard all keys and values of older weights; requests in progress recompute theirs."""
        params = {"reset_running_requests": "true"}
        if not self._call("POST", "/reset_prefix_cache", params=params, read=lambda answer: bool(answer["success"])):
            raise ControlError(f"{self.url} did not reset its prefix cache")

    def join(self, host: str, port: int, first_rank: int, num_ranks: int, seconds: float) -> None:
        """Make its workers join the trainer's group; return when the group is complete."""
        info = {"host": host, "port": port, "first_rank": first_rank, "num_ranks": num_ranks, "seconds": seconds}
        self._call("POST", "/init_weight_transfer_engine", {"init_info": info}, seconds=seconds)

    def start_update(self, seconds: float) -> None:
        """Start a weight update, discarding any that failed halfway."""
        self._rpc("nft_abort_update", seconds)
        self._call("POST", "/start_weight_update", seconds=seconds)

    def update(self, info: dict[str, Any], seconds: float) -> None:
        """Load a folder or a bucket; see ``worker_extension.UpdateInfo``."""
        self._call("POST", "/update_weights", {"update_info": info}, seconds=seconds)

    def finish_update(self, version: int, seconds: float) -> None:
        self._call("POST", "/finish_weight_update", {"weight_version": str(version)}, seconds=seconds)

    def fingerprints(self, seconds: float) -> list[str]:
        """The fingerprint of what each of its workers loaded in the last update."""
        return self._rpc("nft_fingerprint", seconds, lambda results: [str(result["fingerprint"]) for result in results])

    def wrong_tensors(self, seconds: float) -> list[str]:
        """Names of the tensors whose values in the model differ from the last update's."""
        return self._rpc(
            "nft_compare_model", seconds, lambda results: sorted({str(name) for result in results for name in result["wrong"]})
        )

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

        def read(answer: Any) -> list[float]:
            (choice,) = answer["choices"]
            pairs = zip(tokens[1:], choice["prompt_logprobs"][1:], strict=True)
            return [float(logprobs[str(token)]["logprob"]) for token, logprobs in pairs]

        return self._call("POST", "/v1/completions", body, seconds=seconds, read=read)

    def _rpc(self, method: str, seconds: float, read: Callable[[Any], T] = _nothing) -> T:
        """Apply ``read`` to the list of the workers' results."""
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
        """Apply ``read`` to the reply's JSON."""
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
            raise ControlError(f"{self.url}{path} did not answer within {deadline:g} s", silent=True) from error
        except httpx.HTTPError as error:
            raise ControlError(f"{self.url}{path}: {error}", silent=True) from error
        if reply.status_code != 200:
            raise ControlError(f"{self.url}{path} answered {reply.status_code}: {reply.text[:500]}")
        try:
            return read(reply.json())
        except (LookupError, TypeError, ValueError) as error:
            raise ControlError(f"{self.url}{path} sent an unexpected reply ({error!r}): {reply.text[:500]}") from error
