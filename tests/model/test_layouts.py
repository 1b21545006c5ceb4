"""Exports and checkpoints under every layout: nothing is lost, and one layout resumes where another stopped.

Each layout is one task of ``parity_worker.reshard``, which does everything for a tied and an untied model and leaves its
numbers in a JSON file. What the updates compute is the business of test_parity.py.
"""

import json
from pathlib import Path

import pytest
from parity_worker import Run, reshard, restore
from recorded_step import KINDS, LAYOUTS, write_config
from slow import slow_beside

NAMES = (
    "alone",
    "tensor 2",
    "pipeline 2, recompute layers",
    "pipeline 2 interleaved",
    "pipeline 2, uneven × data 2",
    "data 2, half of the optimizer on the host",
    "data 2, overlapped gathering",
    "pipeline 2 interleaved × data 2, overlapped gathering",
    "context 2",
    "tensor 2 × pipeline 2 × context 2",
)
FIRST = NAMES[0]
QUICK = {
    "tensor 2",
    "pipeline 2 interleaved",
    "pipeline 2, uneven × data 2",
    "data 2, half of the optimizer on the host",
    "data 2, overlapped gathering",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def measured_of(world, folder, models, ledger):
    """Measures a layout once; one process first, as the others compare with it."""

    def measure(name: str) -> dict:
        if name != FIRST:
            measure(FIRST)
        if not (folder / name).exists():
            layout = LAYOUTS[name]
            configs = [write_config(folder / name / kind, model, layout) for kind, model in models.items()]
            runs = [Run(config, ledger, config.parent) for config in configs]
            references = [folder / FIRST / kind for kind in KINDS]
            world(layout.num_processes)(reshard, runs, references)
        return {kind: json.loads((folder / name / kind / "stats.json").read_text()) for kind in KINDS}

    return measure


@pytest.fixture(scope="module", params=slow_beside(NAMES, QUICK))
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def measured(name, measured_of) -> dict:
    return measured_of(name)


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


def test_what_any_layout_saved_is_the_same(world, folder, measured, name, ledger):
    """One process restores what each layout wrote right after loading one process's checkpoint, and goes on to the bit."""
    runs = [Run(folder / FIRST / kind / "config.yaml", ledger, folder / name / kind) for kind in KINDS]
    world(1)(restore, runs, [folder / FIRST / kind for kind in KINDS])
    for run in runs:
        assert json.loads((run.out / "restored.json").read_text()) == {"missing": [], "unexpected": [], "differs": []}
