"""What is deleted as a run goes on, and what never is."""

import json
from pathlib import Path

import pytest

from nft_megatron.base.run_folder import RunFolder
from nft_megatron.run.retention import remove_old_checkpoints, remove_old_exports, remove_old_ledgers


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Ledgers of steps 1 to 9, of which 6 and 8 have checkpoints, and exports of 3, 6 and 9."""
    folder = RunFolder(tmp_path)
    folder.make_folders()
    for step in range(1, 10):
        folder.ledger(step).touch()
    for step in (6, 8):
        folder.checkpoint(step).mkdir()
    for step in (3, 6, 9):
        folder.export(step).mkdir()
        (folder.export(step) / "config.json").touch()
    folder.probe.touch()  # lies beside the ledgers
    return folder


@pytest.mark.parametrize(
    ("num_kept", "left"),
    [
        (None, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (1, [6, 7, 8, 9]),  # checkpoint 6 would train 7 to 9 again
        (6, [4, 5, 6, 7, 8, 9]),
        (20, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_ledgers_that_a_kept_checkpoint_needs_stay(folder: RunFolder, num_kept: int | None, left: list[int]):
    remove_old_ledgers(folder, 8, num_kept, 2)
    assert folder.ledger_steps() == left
    assert folder.probe.exists()


def test_a_checkpoint_kept_for_its_accuracy_keeps_no_ledgers(folder: RunFolder):
    folder.checkpoint(2).mkdir()
    remove_old_ledgers(folder, 8, 1, 2)
    assert folder.ledger_steps() == [6, 7, 8, 9]


def test_a_checkpoint_beyond_the_newest_is_of_no_use(folder: RunFolder):
    folder.checkpoint(9).mkdir()  # of a run that was set back to 8
    remove_old_ledgers(folder, 8, 1, 2)
    assert folder.ledger_steps() == [6, 7, 8, 9]


ROWS = [
    {"step": 1, "eval_accuracy_initial": 0.9},
    {"step": 2, "eval_accuracy": 0.5},
    {"step": 4, "eval_accuracy": 0.7},
    {"step": 7, "eval_accuracy": 0.7, "eval_step": 6},
    {"step": 8, "eval_accuracy": None},
    {"step": 9},
]


@pytest.mark.parametrize(
    ("num_kept", "num_best", "left", "best"),
    [
        (1, 0, [10], None),
        (1, 1, [4, 10], 4),  # 6 has the same accuracy
        (1, 2, [4, 6, 10], 4),
        (1, 9, [2, 4, 6, 10], 4),  # 8 was not judged, 10 not evaluated
        (2, 1, [4, 8, 10], 4),
        (9, 1, [2, 4, 6, 8, 10], 4),
    ],
)
def test_the_best_checkpoints_stay_beside_the_newest(tmp_path: Path, num_kept, num_best, left, best):
    folder = RunFolder(tmp_path)
    folder.make_folders()
    for step in (2, 4, 6, 8, 10, 12):  # 12 has been left by a run that was set back
        folder.checkpoint(step).mkdir()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    remove_old_checkpoints(folder, 10, num_kept, num_best)
    assert folder.checkpoint_steps() == [*left, 12]
    assert (folder.best.read_text() if folder.best.exists() else None) == (best and f"step_{best:06d}")


def test_without_a_judged_evaluation_nothing_is_best(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.make_folders()
    for step in (1, 2):
        folder.checkpoint(step).mkdir()
    remove_old_checkpoints(folder, 2, 1, 1)
    assert folder.checkpoint_steps() == [2] and not folder.best.exists()


def test_before_the_first_checkpoint_all_ledgers_stay(folder: RunFolder):
    for step in (6, 8):
        folder.checkpoint(step).rmdir()
    remove_old_ledgers(folder, 8, 1, 2)
    assert len(folder.ledger_steps()) == 9


@pytest.mark.parametrize(("num_kept", "left"), [(None, [3, 6, 9]), (1, [9]), (2, [6, 9]), (5, [3, 6, 9])])
def test_the_newest_exports_stay(folder: RunFolder, num_kept: int | None, left: list[int]):
    remove_old_exports(folder, num_kept)
    assert folder.export_steps() == left


def test_a_run_keeps_what_it_is_told_and_trains_the_same(run_once, metrics_of):
    every = {"every": 2, "keep": 1}
    train = {"num_steps": 5}
    limited = run_once(train=train, checkpoint={**every, "export_every": 1, "keep_exports": 2, "keep_ledgers": 1})
    run = RunFolder(limited)
    assert run.checkpoint_steps() == [5]
    assert run.ledger_steps() == [5]
    assert run.export_steps() == [4, 5]
    unlimited = run_once(train=train, checkpoint=every)
    assert RunFolder(unlimited).ledger_steps() == [1, 2, 3, 4, 5]
    assert metrics_of(limited) == metrics_of(unlimited)
