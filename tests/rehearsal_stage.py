"""Rehearsals as tests see them: cases for rehearsal_worker.py, and what each must have left.

One process runs all cases of a tier with the same kind of layers; each test looks at what its case left.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from recorded_step import Layout, write_config
from tiny_families import save_tiny
from whole_step import TOLERANCE, differing_metrics, distance

TESTS = Path(__file__).parent
WORKERS = {False: TESTS / "rehearsal_worker.py", True: TESTS / "rehearsal_engine_worker.py"}
"""By whether Transformer Engine is there."""
ENGINE = Path(sys.prefix) / "transformer-engine"
"""Where `make engine` installs the engine's Python, apart from the environment, in which Megatron-Core would use it."""
TOKENS = {"micro_batch_tokens": 128}
DISTANCE = {"bfloat16": 0.15, "float32": 2e-5}
"""Largest distance between the weights of device and CPU, as a part of how far training moved them. bf16 weights are rounded to
steps larger than most of an update."""
SMALL_BUCKETS = 2000


def has_engine() -> bool:
    return ENGINE.is_dir() or importlib.util.find_spec("transformer_engine") is not None


@dataclass(frozen=True)
class Rehearsal:
    """A case of rehearsal_worker.py. ``model``: of recorded_step.py, or a family of tiny_families.py.

    ``engine``: in a process where Transformer Engine is installed.
    """

    layout: Layout = field(default_factory=lambda: Layout(1))
    dtype: str = "bfloat16"
    model: str = "tied"
    options: dict = field(default_factory=dict)
    engine: bool = False


class Stage:
    """Runs cases and knows what they left."""

    def __init__(self, root: Path, models: dict[str, Path], ledger: Path) -> None:
        self.root, self.models, self.ledger = root, dict(models), ledger
        self._cases: dict[bool, list[dict]] = {False: [], True: []}

    def add(self, name: str, rehearsal: Rehearsal, **options) -> None:
        if rehearsal.model not in self.models:
            self.models[rehearsal.model] = save_tiny(rehearsal.model, self.root / "families" / rehearsal.model)
        layout, folder = rehearsal.layout, self.root / "cases" / name
        changed = replace(layout, train={**layout.train, **TOKENS})
        config = write_config(folder, self.models[rehearsal.model], changed, dtype=rehearsal.dtype)
        case = {"out": str(self.root / name), "config": str(config), "ledger": str(self.ledger), "world": layout.num_processes}
        self._cases[rehearsal.engine].append(case | rehearsal.options | options)

    def run(self) -> None:
        for engine, cases in self._cases.items():
            if cases:
                self._run(WORKERS[engine], cases, [str(ENGINE)] * engine)

    def _run(self, worker: Path, cases: list[dict], more: list[str]) -> None:
        path = self.root / f"{worker.stem}.json"
        path.write_text(json.dumps(cases))
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path, *more])}
        done = subprocess.run([sys.executable, str(worker), str(path)], env=env, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stderr[-3000:]

    def ranks(self, name: str, world: int = 1) -> list[dict]:
        """What every rank reports; fails with the traceback of one that failed."""
        for rank in range(world):
            assert not (error := self.root / name / f"rank{rank}.err").exists(), error.read_text()[-3000:]
        return [json.loads((self.root / name / f"rank{rank}.json").read_text()) for rank in range(world)]

    def fault(self, name: str) -> tuple[str, str]:
        """The kind of fault that was found, and the traceback."""
        kind, _, text = (self.root / name / "rank0.err").read_text().partition("\n")
        return kind, text

    def distance(self, name: str, reference: str, model: str) -> float:
        """How far the weights are from those of the reference, as a part of how far these are from the first ones."""
        weights = [self.root / case / "weights.safetensors" for case in (name, reference)]
        return distance(*weights, self.models[model] / "model.safetensors")


def rehearse(
    tmp_path_factory, models, ledger, rehearsals: dict[str, Rehearsal], faults: list[str], engine: bool = False
) -> Stage:
    stage = Stage(tmp_path_factory.mktemp("rehearsal"), models, ledger)
    for model, dtype in {(rehearsal.model, rehearsal.dtype) for rehearsal in rehearsals.values()}:
        stage.add(f"CPU {model} {dtype}", Rehearsal(dtype=dtype, model=model), device="cpu", stages="updates")
    for name, rehearsal in rehearsals.items():
        stage.add(name, rehearsal)
    for fault in faults:
        stage.add(fault, Rehearsal(engine=engine), fault=fault, stages="updates")
    stage.run()
    return stage


def check(stage: Stage, name: str, rehearsal: Rehearsal, largest: float | None = None) -> None:
    ranks = stage.ranks(name, rehearsal.layout.num_processes)
    reference = f"CPU {rehearsal.model} {rehearsal.dtype}"
    (of_cpu,) = stage.ranks(reference)
    assert stage.distance(name, reference, rehearsal.model) <= (largest or DISTANCE[rehearsal.dtype])
    assert differing_metrics(ranks[0], of_cpu, TOLERANCE[rehearsal.dtype]) == []
    for rank in ranks:
        assert rank["overlaps"]
        if rehearsal.options.get("bucket"):
            assert rank["num_buckets"] > 2
    if rehearsal.options.get("stages", "all") == "all":
        assert all(rank["load_differs"] == [] and rank["num_moved"] > 0 for rank in ranks)
        assert -1 < ranks[0]["cosine"] < 1
        assert ranks[0]["num_broadcast_buckets"] > 2
        assert ranks[0]["fingerprint"] == ranks[0]["broadcast"] == ranks[0]["exported"]


def check_waits(stage: Stage, name: str, rehearsal: Rehearsal) -> None:
    """The host waits for the device once to prepare a step and once an update, and never because of a micro-batch.

    The gradient's norm is one more wait, Megatron's in 0.16, ours where it returns a tensor; state that returns to host memory
    is another of ours.
    """
    for rank in stage.ranks(name, rehearsal.layout.num_processes):
        for waits, allowed in ((rank["prepare_syncs"], 1), *((syncs, 1) for syncs in rank["update_syncs"])):
            ours = [wait for wait in waits if wait["is_ours"]]
            assert [wait for wait in ours if wait["in_schedule"]] == []
            parking = [wait for wait in ours if wait["file"].endswith("offload.py")]
            norm = [wait for wait in ours if wait["file"].endswith("model/optimizer.py")]
            assert sum(wait["count"] for wait in norm) <= 1, norm
            others = [wait for wait in ours if wait not in (*parking, *norm)]
            assert sum(wait["count"] for wait in others) <= allowed, others
            assert sum(wait["count"] for wait in parking) <= bool(rehearsal.layout.optimizer)
