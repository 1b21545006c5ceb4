"""An answer that its server could not finish: what has arrived of it continues on another server, as if it were prompt.

Tokens, their log-probs and the weights behind them are kept, so that π_old of every token stays that of the weights that drew
it. The rest has a seed of its own: the answer is another sample of the same distribution, and a greedy one is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class PartialAnswer:
    """The first tokens of an answer (int32) and their log-probs (float64), both ``[num_tokens]``.

    ``version``: the oldest weights that any of them may come from, those its first server held when it got the request.

    >>> first = PartialAnswer(np.array([5, 6]), np.array([-0.5, -1.0]), version=3)
    >>> more = first.grown([(np.array([7]), np.array([-0.1]))], version=4)
    >>> more.tokens.tolist(), more.logprobs.tolist(), more.version
    ([5, 6, 7], [-0.5, -1.0, -0.1], 3)
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    version: int

    @classmethod
    def nothing(cls, version: int) -> PartialAnswer:
        return cls(np.zeros(0, dtype=np.int32), np.zeros(0), version)

    def grown(self, pieces: Sequence[tuple[np.ndarray, np.ndarray]], version: int) -> PartialAnswer:
        """With (tokens, log-probs) that a server with weights ``version`` or newer added."""
        return PartialAnswer(
            np.concatenate([self.tokens, *(tokens for tokens, _ in pieces)]),
            np.concatenate([self.logprobs, *(logprobs for _, logprobs in pieces)]),
            min(self.version, version),
        )

    def seed(self, seed: int) -> int:
        """Of the rest of the answer with ``seed``.

        >>> first = PartialAnswer(np.array([5, 6]), np.array([-0.5, -1.0]), version=3)
        >>> first.seed(7) == first.seed(7) != first.seed(8)
        True
        """
        digest = hashlib.blake2b(f"{seed}/{len(self.tokens)}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 2
