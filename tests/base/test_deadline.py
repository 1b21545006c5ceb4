"""A deadline by a clock that the test sets."""

from types import SimpleNamespace

import pytest

from nft_megatron.base import deadline
from nft_megatron.base.deadline import Deadline


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(deadline, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_what_is_left_shrinks_with_the_clock_and_never_reaches_zero(clock):
    limit = Deadline.of(30.0)
    assert (limit.left, limit.has_passed) == (30.0, False)
    clock.now = 129.5
    assert (limit.left, limit.has_passed) == (0.5, False)
    clock.now = 130.0
    assert (limit.left, limit.has_passed) == (0.001, True)
    clock.now = 500.0
    assert (limit.left, limit.has_passed) == (0.001, True)


def test_no_time_at_all_has_passed_at_once(clock):
    assert Deadline.of(0.0).has_passed
