from pathlib import Path

import pytest
from recorded_step import one_in_four_current, write_models, write_step


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders of a tied and an untied model; see :mod:`recorded_step`."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def ledger(tmp_path_factory) -> Path:
    """A recorded step of answers to train these models on."""
    return write_step(tmp_path_factory.mktemp("ledger") / "step_000001.parquet")


@pytest.fixture(scope="session")
def mixed_ledger(tmp_path_factory) -> Path:
    """The same with answers of older and of the current weights."""
    return write_step(tmp_path_factory.mktemp("mixed") / "step_000001.parquet", one_in_four_current)
