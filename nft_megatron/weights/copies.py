"""A tensor stored twice, such as the LM head of a model that ties it to the embedding: is the second one really a copy?

Only one of the two is read. If they differ, dropping the other would change the model, so it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Rows = Callable[[int, int], torch.Tensor]
"""``rows(start, stop)``: those rows of a tensor."""
_BAND_BYTES = 1 << 23


@dataclass(frozen=True)
class Pair:
    """A stored copy and the tensor that is read instead, by name and shape, in whatever files they are."""

    copy: str
    original: str
    copy_shape: tuple[int, ...]
    original_shape: tuple[int, ...]

    def difference(self, copy: Rows, original: Rows) -> str | None:
        """What the copy has that the original has not, in words; None if nothing.

        They are the same if the original, cast to the copy's dtype, has the copy's values. The copy may thus be rounded, but it
        may not know more than the original.
        """
        if self.copy_shape != self.original_shape:
            return f"has shape {list(self.copy_shape)}, but {self.original} has {list(self.original_shape)}"
        num_rows, row_size = self.copy_shape[0], math.prod(self.copy_shape[1:])
        step, num_different, first = max(1, _BAND_BYTES // max(1, 4 * row_size)), 0, ""
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            mine, theirs = copy(start, stop), original(start, stop)
            different = mine != theirs.to(mine.dtype)
            if different.any() and not num_different:
                index = tuple(int(number) for number in different.nonzero()[0])
                values = f"{mine[index].item():.6g} and {theirs[index].item():.6g}"
                first = f"first at {[start + index[0], *index[1:]]}: {values}"
            num_different += int(different.sum())
        if not num_different:
            return None
        total = math.prod(self.copy_shape)
        return f"differs from {self.original} in {num_different} of {total} elements ({first}), but config.json ties the two"

    @property
    def note(self) -> str:
        """What the user is told of a copy that is one."""
        return f"ignored: {self.copy}, a stored copy of {self.original}, to which config.json ties it"


UNTIE = (
    "set tie_word_embeddings to false in its config.json if the model has an LM head of its own; otherwise remove that tensor"
)
"""The remedy for a copy that differs."""
