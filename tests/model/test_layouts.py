"""Exports and checkpoints under every layout: nothing is lost, and one layout resumes where another stopped.

Each layout is one launch of ``parity_worker.reshard``, which does everything for a tied and an untied model and leaves its
numbers in a JSON file. What the updates compute is the business of test_parity.py.
"""

import json
from pathlib import Path

import pytest
from launcher import Ranks
from parity_worker import Run, reshard, restore
from recorded_step import KINDS, LAYOUTS, write_config

NAMES = (
    "alone",
    "tensor 2",
    "pipeline 2, recompute layers",
    "pipeline 2 interleaved",
    "data 2, half of the optimizer on the host",
    "context 2",
    "tensor 2 × pipeline 2 × context 2",
)
FIRST = NAMES[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def measured_of(folder, models, ledger):
    """Measures a layout once; one process first, as the others compare with it."""

    def measure(name: str) -> dict:
        if name != FIRST:
            measure(FIRST)
        if not (folder / name).exists():
            layout = LAYOUTS[name]
            configs = [write_config(folder / name / kind, model, layout) for kind, model in models.items()]
            runs = [Run(config, ledger, config.parent) for config in configs]
            references = [folder / FIRST / kind for kind in KINDS]
            ended = Ranks(reshard, (runs, references), layout.num_processes, folder).wait()
            assert ended.returncode == 0, ended.stderr
        return {kind: json.loads((folder / name / kind / "stats.json").read_text()) for kind in KINDS}

    return measure


@pytest.fixture(scope="module", params=NAMES)
def measured(request, measured_of) -> dict:
    return measured_of(request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_export_gives_back_the_folder_bit_for_bit(measured: dict, kind: str):
    assert measured[kind]["exported"] == {"missing": [], "unexpected": [], "differs": []}


@pytest.mark.parametrize("kind", KINDS)
def test_updates_agree_with_one_process(measured: dict, kind: str):
    assert measured[kind]["update_error"] < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_run_continues_bit_for_bit(measured: dict, kind: str):
    assert measured[kind]["restored"] == {"missing": [], "unexpected": [], "differs": []}
    assert measured[kind]["restored_step"] == 7
    assert measured[kind]["restored_updates"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_one_process_loads_under_every_layout(measured: dict, kind: str):
    assert measured[kind]["resharded"] == {"missing": [], "unexpected": [], "differs": []}
    assert measured[kind]["continued_error"] < 1e-6


def test_what_any_layout_saved_is_the_same(folder, measured_of, models, ledger):
    """One process restores what each layout wrote right after loading one process's checkpoint, and continues bit for bit."""
    for name in NAMES:
        measured_of(name)
    runs = [Run(folder / FIRST / kind / "config.yaml", ledger, folder / name / kind) for name in NAMES for kind in KINDS]
    ended = Ranks(restore, (runs, [folder / FIRST / kind for _ in NAMES for kind in KINDS]), 1, folder).wait()
    assert ended.returncode == 0, ended.stderr
    written = {run.out: json.loads((run.out / "restored.json").read_text()) for run in runs}
    assert written == {run.out: {"missing": [], "unexpected": [], "differs": []} for run in runs}
