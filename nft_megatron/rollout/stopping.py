"""When an answer is finished: a stop token, or a text in what has been decoded so far."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nft_megatron.base.records import Sampling


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


class StopRule:
    """Finds the rows of a batch whose newest token ends the answer. The tokenizer in ``folder`` is read only for stop texts."""

    def __init__(self, sampling: Sampling, vocab_size: int, folder: Path) -> None:
        self._is_stop_V = np.isin(np.arange(vocab_size), sampling.stop_token_ids)
        self._texts = sampling.stop
        # Every token adds a byte of text or more, so a text that the newest token completes began within its length in tokens;
        # four more, the most bytes of a character, keep a character cut in two at the window's edge out of it.
        self._window = max((len(text.encode()) for text in self._texts), default=0) + 4
        self._tokenizer = _tokenizer(folder) if self._texts else None

    def find(self, tokens_BT: np.ndarray, counts_B: np.ndarray) -> np.ndarray:
        """Bool ``[B]``: the answer ``tokens_BT[b, :counts_B[b]]``, not finished before its last token, is finished with it."""
        rows = np.arange(len(counts_B))
        found_B = self._is_stop_V[tokens_BT[rows, counts_B - 1]]
        if self._tokenizer is None:
            return found_B
        windows = [tokens_BT[row, max(0, count - self._window) : count].tolist() for row, count in enumerate(counts_B)]
        decoded = self._tokenizer.batch_decode(windows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return found_B | np.array([any(text in answer for text in self._texts) for answer in decoded], dtype=bool)
