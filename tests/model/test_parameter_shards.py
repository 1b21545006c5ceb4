"""Ranges of row-major arrays as boxes. What a rank stores of a model is in test_layouts.py and benchmarks/."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nft_megatron.model.parameter_shards import boxes


@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=4), data=st.data())
def test_boxes_are_the_range_in_order(shape: list[int], data: st.DataObject) -> None:
    array = np.arange(np.prod(shape)).reshape(shape)
    start = data.draw(st.integers(0, array.size))
    stop = data.draw(st.integers(start, array.size))
    found = list(boxes(shape, start, stop))
    cut = [array[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].ravel() for box in found]
    assert np.concatenate([np.empty(0, dtype=int), *cut]).tolist() == list(range(start, stop))
    assert len(found) <= 2 * len(shape) - 1
