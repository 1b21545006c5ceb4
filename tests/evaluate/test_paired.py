"""Against enumeration, tables of Student's t, and integration of its density."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nft_megatron.evaluate.paired import mcnemar, mean_difference, paired_difference, t_quantile, two_sided


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (0, 4), (3, 3), (2, 7), (9, 1)])
def test_mcnemar_is_the_share_of_ways_to_toss_that_are_as_lopsided(only_first: int, only_second: int) -> None:
    """If neither model is better, each question on which they disagree is a fair coin: all 2^n outcomes, counted."""
    num, gap = only_first + only_second, abs(only_first - only_second)
    lopsided = [abs(2 * sum(tosses) - num) >= gap for tosses in itertools.product((0, 1), repeat=num)]
    assert mcnemar(only_first, only_second) == pytest.approx(sum(lopsided) / len(lopsided))


def test_mcnemar_on_a_textbook_table() -> None:
    """Binomial(26, 1/2): 2·P(B ≤ 6) = 2·(1 + 26 + 325 + 2600 + 14950 + 65780 + 230230) / 2^26."""
    assert mcnemar(20, 6) == mcnemar(6, 20) == pytest.approx(2 * 313_912 / 2**26)


# Two-sided 5 %, 1 % and 0.1 % points of Student's t, as printed in tables.
POINTS = {
    1: (12.706, 63.657, 636.619),
    2: (4.303, 9.925, 31.599),
    3: (3.182, 5.841, 12.924),
    4: (2.776, 4.604, 8.610),
    5: (2.571, 4.032, 6.869),
    10: (2.228, 3.169, 4.587),
    29: (2.045, 2.756, 3.659),
    30: (2.042, 2.750, 3.646),
    120: (1.980, 2.617, 3.373),
}


@pytest.mark.parametrize("degrees", POINTS)
def test_students_t_is_that_of_the_tables(degrees: int) -> None:
    for p, t in zip((0.05, 0.01, 0.001), POINTS[degrees], strict=True):
        assert two_sided(t, degrees) == pytest.approx(p, rel=2e-3)
        assert two_sided(-t, degrees) == two_sided(t, degrees)
    assert t_quantile(degrees) == pytest.approx(POINTS[degrees][0], abs=6e-4)


@pytest.mark.parametrize("degrees", [1, 2, 7, 39, 499, 674])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.5])
def test_students_t_is_the_integral_of_its_density(degrees: int, t: float) -> None:
    x = np.linspace(-t, t, 20_001)
    norm = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    inside = np.trapezoid(norm * (1 + x**2 / degrees) ** (-(degrees + 1) / 2), x)
    assert two_sided(t, degrees) == pytest.approx(1 - inside, abs=1e-8)


def test_a_paired_t_test_by_hand() -> None:
    """d = 1/4, 1/2, 0, 1/4: mean 1/4, variance (0 + 1/16 + 1/16 + 0)/3 = 1/24, error sqrt(1/96), t = sqrt(6), 3 degrees.

    For 3 degrees P(|T| ≥ t) = 1 − (2/π)·(θ + sin θ cos θ), θ = atan(t/√3): here tan θ = √2, sin θ cos θ = √2/3.
    """
    pair = paired_difference([0.75, 1.0, 0.5, 0.5], [0.5, 0.5, 0.5, 0.25], single=False)
    assert (pair.questions, pair.only_first, pair.only_second, pair.test) == (4, 3, 0, "paired t")
    assert pair.difference == 0.25
    assert pair.standard_error == pytest.approx(math.sqrt(1 / 96))
    assert pair.p_value == pytest.approx(1 - 2 / math.pi * (math.atan(math.sqrt(2)) + math.sqrt(2) / 3))
    assert (pair.low, pair.high) == pytest.approx((0.25 - 3.1824463 / math.sqrt(96), 0.25 + 3.1824463 / math.sqrt(96)))


def test_single_answers_are_compared_by_mcnemar() -> None:
    first, second = [1, 1, 1, 0, 0, 1], [0, 0, 0, 1, 0, 1]
    pair = paired_difference(first, second, single=True)
    assert (pair.only_first, pair.only_second, pair.test) == (3, 1, "McNemar")
    assert pair.difference == pytest.approx(2 / 6)
    assert pair.p_value == pytest.approx(2 * (1 + 4) / 16)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12))
def test_the_other_way_round_only_signs_change(shares: list[tuple[int, int]]) -> None:
    first, second = ([share[i] / 4 for share in shares] for i in (0, 1))
    one, other = paired_difference(first, second, single=False), paired_difference(second, first, single=False)
    assert other.difference == pytest.approx(-one.difference)
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low), nan_ok=True)
    assert (other.only_first, other.only_second) == (one.only_second, one.only_first)
    assert other.p_value == pytest.approx(one.p_value, nan_ok=True)
    error = np.std(np.subtract(first, second), ddof=1) / math.sqrt(len(shares))
    assert one.standard_error == pytest.approx(error if error or not one.difference else math.nan, nan_ok=True)


def test_what_cannot_be_known_is_nan() -> None:
    lone = paired_difference([1.0], [0.0], single=False)
    assert lone.difference == 1 and all(map(math.isnan, (lone.standard_error, lone.low, lone.high, lone.p_value)))
    assert math.isnan(paired_difference([], [], single=True).difference)
    for first, second in (([0.5, 0.5], [0.25, 0.25]), ([1 / 3, 0.1], [2 / 3, 0.1 + 1 / 3])):
        equal = paired_difference(first, second, single=False)
        assert math.isnan(equal.standard_error) and math.isnan(equal.p_value), "equal differences have no spread"
    assert paired_difference([0.5, 0.5], [0.5, 0.5], single=False).p_value == 1


def test_the_mean_of_independent_benchmarks() -> None:
    """Differences 0.2 and 0.1 with errors 0.03 and 0.04: 0.15 ± 0.025, six errors from 0; 1.959964 errors hold 95 %."""
    pairs = [
        paired_difference([0.2 + 0.03 * math.sqrt(2) / 2 * sign * math.sqrt(2) for sign in (1, -1)], [0.0, 0.0], single=False),
        paired_difference([0.1 + 0.04 * math.sqrt(2) / 2 * sign * math.sqrt(2) for sign in (1, -1)], [0.0, 0.0], single=False),
    ]
    assert [pair.standard_error for pair in pairs] == pytest.approx([0.03, 0.04])
    mean = mean_difference(pairs)
    assert (mean.difference, mean.standard_error, mean.questions) == pytest.approx((0.15, 0.025, 4))
    assert (mean.low, mean.high) == pytest.approx((0.15 - 1.959964 * 0.025, 0.15 + 1.959964 * 0.025))
    assert mean.p_value == pytest.approx(1.973175e-9, rel=1e-5)  # of the normal distribution at 6


def test_the_interval_covers_and_the_test_keeps_its_level() -> None:
    """Two models of equal skill on questions of very different difficulty: 95 % intervals hold 0, and p < 5 % in about 5 %.

    Unpaired standard errors would be more than three times as wide.
    """
    rng = np.random.default_rng(0)
    held, small, ratios = 0, 0, []
    for _ in range(1500):
        chances = rng.beta(0.3, 0.3, size=40)
        first, second = (rng.binomial(16, chances) / 16 for _ in range(2))
        pair = paired_difference(first.tolist(), second.tolist(), single=False)
        held += pair.low <= 0 <= pair.high
        small += pair.p_value < 0.05
        ratios.append(math.hypot(first.std(ddof=1), second.std(ddof=1)) / math.sqrt(40) / pair.standard_error)
    assert held == 1500 - small
    assert 0.035 <= small / 1500 <= 0.065
    assert np.mean(ratios) > 3
