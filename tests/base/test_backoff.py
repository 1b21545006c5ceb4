"""Delays between attempts, against the powers of two written out."""

from nft_megatron.base.backoff import Backoff


def test_delays_double_from_the_first_to_the_longest():
    backoff = Backoff()
    assert [backoff.next_delay() for _ in range(9)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_success_starts_over():
    backoff = Backoff(first=0.5, longest=3.0)
    assert [backoff.next_delay() for _ in range(4)] == [0.5, 1.0, 2.0, 3.0]
    backoff.reset()
    backoff.reset()
    assert [backoff.next_delay() for _ in range(2)] == [0.5, 1.0]


def test_each_has_its_own_delays():
    first, second = Backoff(), Backoff()
    first.next_delay()
    assert (first.next_delay(), second.next_delay()) == (2.0, 1.0)
