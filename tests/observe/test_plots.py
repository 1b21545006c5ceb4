"""What the overview picture shows."""

import pytest

from nft_megatron.observe.metrics import RATE_BUCKETS
from nft_megatron.observe.plots import overview

PLAIN = [{"step": step, "accuracy": 0.1 * step, "entropy": 0.5, "time/update": 2.0} for step in (1, 2, 3)]


def panels(figure):
    return {axes.get_title(loc="left").partition(":")[0]: axes for axes in figure.axes}


def test_without_instruments_there_are_four_panels():
    figure = overview(PLAIN)
    assert len(figure.axes) == 4
    assert figure.get_size_inches() == pytest.approx([12, 7])


def test_instruments_have_a_row_of_their_own():
    rows = [
        row | {"clamp_rate/0.4-0.6": 0.2 * row["step"], "gradient_share/0.0-0.2": 0.25, "gradient_share/0.4-0.6": 0.75}
        for row in PLAIN
    ]
    rows[1]["gradient_cosine"] = -0.4
    del rows[2]["clamp_rate/0.4-0.6"]
    figure = overview(rows)
    assert len(figure.axes) == 7
    found = panels(figure)
    (line,) = found["Clamped tokens of wrong answers, by r̂"].lines  # one bucket has any
    assert (line.get_label(), list(line.get_xdata())) == ("0.4-0.6", [1, 2])
    assert list(line.get_ydata()) == pytest.approx([0.2, 0.4])
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in found["Share of the gradient, by r̂"].collections]
    assert len(tops) == len(RATE_BUCKETS) and tops == pytest.approx([0.25, 0.25, 1.0, 1.0, 1.0])  # one upon the other
    assert found["Cosine of right and wrong gradients"].lines[1].get_xydata().tolist() == [[2, -0.4]]


def test_an_instrument_without_data_has_no_panel():
    assert len(overview([{"step": 1, "gradient_share/0.8-1.0": 1.0}]).axes) == 5
