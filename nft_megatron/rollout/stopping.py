"""What ends an answer: a stop token, or a stop text in what has been decoded so far."""

from __future__ import annotations

import bisect
from functools import lru_cache
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nft_megatron.base.records import Sampling
from nft_megatron.weights.readable_config import readable_config

_CONTEXT_TOKENS = 4  # enough to show whether a word continues the text before it


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    config = readable_config(folder)
    return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False, local_files_only=True)


class StopRule:
    """Finds what ends an answer: in the rows of a batch whose newest token does, and in a whole answer.

    Reads the tokenizer in ``folder`` only for stop texts.
    """

    def __init__(self, sampling: Sampling, vocab_size: int, folder: Path) -> None:
        self._is_stop_V = np.isin(np.arange(vocab_size), sampling.stop_token_ids)
        self._texts = sampling.stop
        # Every token adds at least one byte, so a stop text that the newest token completes spans at most as many tokens as it
        # has bytes. Four more tokens, the most bytes in a character, keep a character split at the window's edge out of it.
        self._window = max((len(text.encode()) for text in self._texts), default=0) + 4
        self._tokenizer = _tokenizer(folder) if self._texts else None

    def find(self, tokens_BT: np.ndarray, counts_B: np.ndarray) -> np.ndarray:
        """Bool ``[B]``: whether the last token of ``tokens_BT[b, :counts_B[b]]`` ends it. Earlier tokens must not have."""
        rows = np.arange(len(counts_B))
        found_B = self._is_stop_V[tokens_BT[rows, counts_B - 1]]
        if self._tokenizer is None:
            return found_B
        windows = [tokens_BT[row, max(0, count - self._window) : count].tolist() for row, count in enumerate(counts_B)]
        decoded = self._tokenizer.batch_decode(windows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return found_B | np.array([any(text in answer for text in self._texts) for answer in decoded], dtype=bool)

    def first(self, tokens_T: np.ndarray, context: np.ndarray | None = None) -> int | None:
        """After how many of ``tokens_T`` the answer ends, or None. They follow the tokens ``context``.

        A stop token's own text is not searched, nor is that of what follows it.
        """
        stops = np.flatnonzero(self._is_stop_V[tokens_T])
        by_token = int(stops[0]) + 1 if len(stops) else None
        if self._tokenizer is None:
            return by_token
        before = [] if context is None else context[-_CONTEXT_TOKENS:].tolist()
        start = len(self._decode(before))

        def is_in(count: int) -> bool:
            text = self._decode([*before, *tokens_T[:count].tolist()])[start:]
            return any(stop in text for stop in self._texts)

        num_tokens = len(tokens_T) if by_token is None else by_token - 1
        if not is_in(num_tokens):
            return by_token
        if not is_in(num_tokens - 1):
            return num_tokens
        return bisect.bisect_left(range(num_tokens), True, key=is_in)

    def _decode(self, tokens: list[int]) -> str:
        assert self._tokenizer is not None
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
