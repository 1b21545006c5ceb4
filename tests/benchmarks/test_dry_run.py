"""benchmarks/dry_run.py with 16 ranks of a tiny model: their plans fit together, and those with a planted fault do not."""

import dry_run_worker
import pytest


@pytest.fixture(scope="module")
def measured(world) -> dict:
    return world(1)(dry_run_worker.measure)


@pytest.mark.parametrize("name", dry_run_worker.CASES)
def test_the_plans_of_all_ranks_fit_together(measured: dict, name: str):
    ledger, checkpoint, publishing = measured[name]["found"]
    assert ledger.startswith("ledger: 256 answers")
    assert "written once" in checkpoint
    assert publishing.startswith("publishing:")


@pytest.mark.parametrize("name", dry_run_worker.CASES)
@pytest.mark.parametrize("fault", dry_run_worker.FAULTS)
def test_a_planted_fault_is_found(measured: dict, name: str, fault: str):
    assert measured[name]["raised"][fault] is not None
