"""The protocol between the trainer and whatever generates the answers.

Two rules hold for every engine. An answer depends on the weights, the prompt, the sampling settings and its own seed, never
on what else is generated beside it. And an engine that is not sure of its weights does not serve: after a failed load or a
fault it refuses until it holds the current ones again.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Completion, Request, Sampling

if TYPE_CHECKING:
    import torch


class EngineFault(RuntimeError):
    """An engine cannot serve: a worker raised, died again and again, or missed a deadline."""


class Engine(Protocol):
    """What generates answers.

    ``overlaps`` says what may run at once. False: nothing, one caller has one ``load`` or one ``generate`` at a time. True:
    several ``generate`` run beside each other from different threads, and ``load`` may be called while they do; an answer in
    progress is then finished first, or continued on the new weights: it carries the oldest version among its tokens.
    """

    @property
    def overlaps(self) -> bool: ...

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        """Take over the weights in ``tensors``, a stream under Hugging Face's names, and return their fingerprint.

        Waits for: every process of the engine to hold them. Unblocks: ``generate``, whose answers carry ``version`` from
        here on. The fingerprint is that of :mod:`nft_megatron.weights.fingerprint`, of the stream, computed where the
        weights arrived. Raises ``UserError`` for a missing, unexpected or repeated name and for a wrong shape; the engine
        is then without weights.
        """

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, given_up: Container[int] = frozenset()
    ) -> Iterator[Completion]:
        """Yield one completion for each seed of each request, as they finish, in any order.

        Waits for: weights (without them it raises). Unblocks: the verifier, with the first answer, while the others are
        still being generated. Giving the iterator up early is allowed and ends the work on the rest. So is giving up single
        requests: the caller may add ids to ``given_up`` at any time, and of such a request nothing more is yielded.

        An answer that faults cut off is asked again where there is another process to ask, and else yielded with the finish
        reason ``abort``. Raises ``EngineFault`` where that does not help: without weights, when a process dies again and again,
        and for an error inside the engine, such as logits that are not finite; it names the cause.
        """

    def close(self) -> None:
        """End all processes of the engine; it cannot be used afterwards."""


def check_requests(requests: Sequence[Request], sampling: Sampling, vocab_size: int, max_positions: int) -> None:
    """Raise ``UserError`` where a request cannot be answered by a model of this vocabulary and context length.

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
