"""The benchmark of published runs holds its bounds."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "plan_published.py"
_spec = importlib.util.spec_from_file_location("plan_published", PATH)
published = importlib.util.module_from_spec(_spec)
sys.modules["plan_published"] = published  # dataclasses look their module up
_spec.loader.exec_module(published)


@pytest.mark.parametrize("row", published.TRAINING, ids=lambda row: row.name)
def test_training_steps_within_8_percent(row):
    assert row.planned() == pytest.approx(row.seconds, rel=0.08)


@pytest.mark.parametrize("row", published.RL, ids=lambda row: row.name)
def test_rl_steps_within_15_percent(row):
    assert row.planned()[0] == pytest.approx(row.seconds, rel=0.15)


@pytest.mark.parametrize("row", published.LAYOUTS, ids=lambda row: row.name)
def test_layouts_that_run_on_80_gb_are_not_refused(row):
    assert row.planned().fits
