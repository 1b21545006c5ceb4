import gc
import weakref

import pytest

from nft_megatron.base.garbage import collected_afterwards, frozen


class Node:
    """In a cycle with itself, so that only a collection frees it."""

    def __init__(self) -> None:
        self.self = self


def test_nothing_is_collected_inside_and_everything_after_it():
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        with collected_afterwards():
            seen = weakref.ref(Node())
            _ = [[] for _ in range(1000)]  # would make the collector run
            assert seen() is not None
        assert seen() is None
    finally:
        gc.set_threshold(*threshold)


def test_the_collector_is_as_before_also_after_an_error():
    with pytest.raises(KeyError), collected_afterwards():
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    try:
        with collected_afterwards():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_was_frozen_is_found_again():
    before = gc.get_freeze_count()
    node = Node()
    seen = weakref.ref(node)
    with frozen():
        del node
        gc.collect()
        assert (seen() is None) == (before > 0)  # somebody else froze first, and keeps what is theirs
    assert gc.get_freeze_count() == before
    gc.collect()
    assert seen() is None
