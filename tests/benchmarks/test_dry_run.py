"""benchmarks/dry_run.py with 16 ranks of a tiny model: their plans fit together, and those with a planted fault do not."""

import dry_run_worker
import pytest


@pytest.fixture(scope="module")
def measured(world) -> dict:
    return world(1)(dry_run_worker.measure)


def test_the_plans_of_all_ranks_fit_together(measured: dict):
    ledger, checkpoint, publishing = measured["found"]
    assert ledger.startswith("ledger: 256 answers")
    assert "written once" in checkpoint
    assert publishing.startswith("publishing:")


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("a rank reads an answer less", "every answer is read by one rank"),
        ("a rank reads another's answers too", "every answer is read by one rank"),
        ("a rank's packs lack a token", "the same packs"),
        ("a rank writes what another writes", "no two ranks write the same box"),
        ("a rank writes a row of another's, too", "overlapping chunks"),
        ("a rank writes a tensor less", "invalid fill"),
        ("a message is not received", "whatever is sent is received"),
        ("a tensor is published twice", "no tensor twice"),
    ],
)
def test_a_planted_fault_is_found(measured: dict, fault: str, text: str):
    assert text in measured["raised"][fault]
