"""The protocol between the trainer and whatever generates the answers.

Every engine follows two rules. An answer depends on the weights, the prompt, the sampling settings and its own seed, never on
what else is generated alongside it. And an engine that is unsure of its weights does not serve: after a failed load or a fault
it refuses requests until it holds the current weights again.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Completion, Request, Sampling

if TYPE_CHECKING:
    import torch


class EngineFault(RuntimeError):
    """An engine cannot serve: a worker raised, kept dying, or missed a deadline."""


class Engine(Protocol):
    """Generates answers.

    ``overlaps`` says whether calls may overlap. False: only one ``load`` or ``generate`` runs at a time. True: several
    ``generate`` calls may run concurrently from different threads, and ``load`` may be called while they do; an answer in
    progress is then either finished first or continued on the new weights, and carries the oldest version among its tokens.
    """

    @property
    def overlaps(self) -> bool: ...

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        """Load the weights in ``tensors``, a stream under Hugging Face's names, and return their fingerprint.

        Waits for: every process of the engine to hold them. Unblocks: ``generate``, whose answers carry ``version`` from now
        on. The fingerprint (:mod:`nft_megatron.weights.fingerprint`) covers the stream and is computed where the weights
        arrive. Raises ``UserError`` for a missing, unexpected or repeated name or a wrong shape; the engine then holds no
        weights.
        """

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, given_up: Container[int] = frozenset()
    ) -> Iterator[Completion]:
        """Yield one completion for each seed of each request, in the order they finish.

        Waits for: weights (without them it raises). Unblocks: the verifier, from the first answer on, while the others are
        still being generated. The caller may close the iterator early, which ends the remaining work, and may add request ids
        to ``given_up`` at any time: nothing more is yielded for those requests.

        An answer cut off by a fault is requested again if there is another process to ask; otherwise it is yielded with the
        finish reason ``abort``. Raises ``EngineFault``, naming the cause, if that cannot help: there are no weights, a process
        keeps dying, or the engine itself fails, for example with logits that are not finite.
        """

    def close(self) -> None:
        """End all of the engine's processes. It cannot be used afterwards."""


class AnswerStream(Protocol):
    """Answers to questions that are asked one after the other, from one thread. They outlive new weights."""

    @property
    def version(self) -> int:
        """No answer to a request that is made now has a token from older weights than these."""

    def ask(self, requests: Sequence[Request]) -> None:
        """Make requests; their ids differ from those of all requests in progress. Does not wait."""

    def next(self, timeout: float) -> Completion | None:
        """The next answer to end, or None if none does within ``timeout`` seconds. Raises as ``Engine.generate`` does."""

    def close(self) -> None:
        """End the requests in progress."""


@runtime_checkable
class StreamingEngine(Engine, Protocol):
    """An engine that can take new requests while it answers others."""

    def open_stream(self, sampling: Sampling) -> AnswerStream: ...


def check_requests(requests: Sequence[Request], sampling: Sampling, vocab_size: int, max_positions: int) -> None:
    """Raise ``UserError`` if a model with this vocabulary and context length cannot answer a request.

    >>> import numpy as np
    >>> request = Request(0, np.arange(10), seeds=(1,))
    >>> check_requests([request], Sampling(max_tokens=6), vocab_size=10, max_positions=16)
    >>> check_requests([request], Sampling(max_tokens=7), vocab_size=10, max_positions=16)
    Traceback (most recent call last):
    nft_megatron.base.errors.UserError: rollout.max_answer_tokens = 7: with a prompt of 10 tokens it exceeds the model's \
context of 16 tokens; set it to at most 6, or leave out longer prompts
    """
    if not sampling.temperature >= 0:
        raise UserError("temperature", sampling.temperature, "is negative", "use 0 for greedy answers, 1 for training")
    if not 0 < sampling.top_p <= 1:
        raise UserError("top_p", sampling.top_p, "is not in (0, 1]", "use 1 for the whole distribution")
    if sampling.max_tokens < 1:
        raise UserError("rollout.max_answer_tokens", sampling.max_tokens, "leaves no room for an answer", "set it to 1 or more")
    for request in requests:
        num_tokens = len(request.prompt_tokens)
        if num_tokens == 0:
            raise UserError("prompt", f"request {request.request_id}", "has no tokens", "check the prompt template")
        if not 0 <= int(request.prompt_tokens.min()) <= int(request.prompt_tokens.max()) < vocab_size:
            raise UserError(
                "prompt",
                f"request {request.request_id}",
                f"has token ids outside the vocabulary of {vocab_size}",
                "use the tokenizer that belongs to the model",
            )
        if num_tokens + sampling.max_tokens > max_positions:
            raise UserError(
                "rollout.max_answer_tokens",
                sampling.max_tokens,
                f"with a prompt of {num_tokens} tokens it exceeds the model's context of {max_positions} tokens",
                f"set it to at most {max_positions - num_tokens}, or leave out longer prompts",
            )
