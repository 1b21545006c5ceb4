"""Whether an answer that a server sent is one to its request: checked before anything else sees it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nft_megatron.base.records import Sampling
from nft_megatron.rollout.stopping import StopRule

_NO_LOGPROB = -9999.0  # vLLM sends this for a log-prob that is missing, NaN or -inf


class AnswerRule:
    """What every answer under ``sampling`` fulfils. ``folder``: of the model, whose tokenizer is read only for stop texts.

    >>> rule = AnswerRule(Sampling(max_tokens=3, stop_token_ids=(9,)), vocab_size=10, folder=Path("unused"))
    >>> logprobs = np.array([-0.5, -1.0], dtype=np.float32)
    >>> rule.problem(np.array([4, 9]), logprobs, "stop") is None
    True
    >>> rule.problem(np.array([4, 5]), logprobs, "stop")
    'ended an answer that no stop token or text ends'
    >>> rule.problem(np.array([4, 5]), logprobs, "length")
    'cut an answer off after 2 tokens, although 3 were allowed: its --max-model-len may be too small'
    """

    def __init__(self, sampling: Sampling, vocab_size: int, folder: Path) -> None:
        self.max_tokens, self._vocab_size = sampling.max_tokens, vocab_size
        self._has_stop_texts = bool(sampling.stop)
        self._stop = StopRule(sampling, vocab_size, folder)

    def problem(
        self, tokens: np.ndarray, logprobs: np.ndarray, finish_reason: str, prompt_tokens: np.ndarray | None = None
    ) -> str | None:
        """What is wrong with an answer, to follow the server's name, or None.

        ``prompt_tokens`` precede the answer: some tokenizers drop the blank before a text's first word.
        """
        if finish_reason not in ("stop", "length"):
            return f"ended an answer with {finish_reason[:50]!r}"
        if not 0 < len(tokens) <= self.max_tokens:
            return f"sent an answer of {len(tokens)} tokens, not of 1 to {self.max_tokens}"
        if len(tokens) != len(logprobs) or not ((logprobs <= 0) & (logprobs > _NO_LOGPROB)).all():
            return "sent a token without a log-prob that is finite and ≤ 0: its logits are not finite, or it is misconfigured"
        if not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            return f"sent tokens outside the vocabulary of {self._vocab_size}"
        end = self._stop.first(tokens, prompt_tokens)
        if end is not None and end < len(tokens):
            return f"continued after an answer had ended with its token {end} of {len(tokens)}"
        if finish_reason == "stop" and end is None:
            return "ended an answer that no stop token or text ends"
        if finish_reason == "length" and end is not None:
            return "calls an answer truncated that a stop token or text ends"
        if finish_reason == "length" and len(tokens) < self.max_tokens:
            return (
                f"cut an answer off after {len(tokens)} tokens, although {self.max_tokens} were allowed: "
                "its --max-model-len may be too small"
            )
        return None

    def may_continue(self, tokens: np.ndarray, logprobs: np.ndarray) -> bool:
        """Whether these may begin an answer that has not ended. With stop texts nothing may: one could lie across the cut.

        >>> rule = AnswerRule(Sampling(max_tokens=3, stop_token_ids=(9,)), vocab_size=10, folder=Path("unused"))
        >>> logprobs = np.array([-0.5, -1.0], dtype=np.float32)
        >>> rule.may_continue(np.array([4, 5]), logprobs), rule.may_continue(np.array([4, 9]), logprobs)
        (True, False)
        """
        return bool(
            not self._has_stop_texts
            and 0 < len(tokens) < self.max_tokens
            and ((logprobs <= 0) & (logprobs > _NO_LOGPROB)).all()
            and 0 <= tokens.min() <= tokens.max() < self._vocab_size
            and self._stop.first(tokens) is None
        )
