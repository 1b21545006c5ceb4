"""Whole training steps on a pretended GPU (rehearsal_device.py): every place where host and device meet, no kernel.

One process runs all cases of a tier; each test looks at what its case left.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from recorded_step import LAYOUTS, Layout, write_config
from tiny_families import save_tiny
from whole_step import TOLERANCE, differing_metrics, distance

WORKER = Path(__file__).parents[1] / "rehearsal_worker.py"
TOKENS = {"micro_batch_tokens": 128}
DISTANCE = {"bfloat16": 0.15, "float32": 2e-5}
"""Largest distance between the weights of device and CPU, as a part of how far training moved them. bf16 weights are rounded to
steps larger than most of an update."""
SMALL_BUCKETS = 2000
FAULTS = {
    "zeros in host memory": "DeviceMismatch",
    "a tensor that was not moved": "DeviceMismatch",
    "memory that is not pinned": "PageableCopy",
    "a host tensor in a collective of NCCL": "DeviceMismatch",
    "an index in host memory": "DeviceMismatch",
    "a generator of the CPU": "WrongGenerator",
    "states of a CPU's generators": "WrongGenerator",
    "a copy read before it has arrived": "EarlyRead",
}
"""What finds each; one more, an item in every micro-batch, is found by counting."""


@dataclass(frozen=True)
class Rehearsal:
    """A case of rehearsal_worker.py. ``model``: of recorded_step.py, or a family of tiny_families.py."""

    layout: Layout = field(default_factory=lambda: Layout(1))
    dtype: str = "bfloat16"
    model: str = "tied"
    options: dict = field(default_factory=dict)


QUICK = {
    "bf16": Rehearsal(),
    "float32, half of the optimizer on the host, several buckets": Rehearsal(
        Layout(1, optimizer={"cpu_offload": 0.5}), "float32", options={"bucket": SMALL_BUCKETS}
    ),
    "context 2": Rehearsal(LAYOUTS["context 2"], options={"stages": "updates"}),
}
LAYOUTS_AND_DTYPES = (
    ("tensor 2", "bfloat16", "tied"),
    ("tensor 2", "float32", "untied"),
    ("pipeline 2, recompute layers", "bfloat16", "tied"),
    ("pipeline 2 interleaved", "float32", "untied"),
    ("context 2", "bfloat16", "untied"),
    ("context 2", "float32", "tied"),
    ("data 2, half of the optimizer on the host", "bfloat16", "tied"),
    ("tensor 2 × pipeline 2 × context 2", "bfloat16", "tied"),
)
FAMILIES = ("qwen3", "llama 3", "mistral", "qwen3_moe", "qwen3_moe raw")
MORE = {
    "pipeline 2": Rehearsal(Layout(2, {"pipeline": 2}), options={"stages": "updates"}),
    "data 2, several buckets": Rehearsal(Layout(2), options={"bucket": SMALL_BUCKETS, "stages": "updates"}),
    "data 2, several buckets, overlapped gathering": Rehearsal(
        LAYOUTS["data 2, overlapped gathering"], options={"bucket": SMALL_BUCKETS}
    ),
    "pipeline 2, uneven": Rehearsal(Layout(2, {"pipeline": 2, "last_stage_layers": 1}), options={"stages": "updates"}),
    "torch's operators for the LM head": Rehearsal(Layout(1, kernels={"fused_lm_head": False}), options={"stages": "updates"}),
    **{f"{name}, {dtype}": Rehearsal(LAYOUTS[name], dtype, model) for name, dtype, model in LAYOUTS_AND_DTYPES},
    **{family: Rehearsal(model=family) for family in FAMILIES},
    "qwen3_moe, expert 2": Rehearsal(Layout(2, {"expert": 2}), model="qwen3_moe"),
    "qwen3_moe, tensor 2": Rehearsal(Layout(2, {"tensor": 2}), model="qwen3_moe"),
}


class Stage:
    """Runs cases and knows what they left."""

    def __init__(self, root: Path, models: dict[str, Path], ledger: Path) -> None:
        self.root, self.models, self.ledger = root, dict(models), ledger
        self._cases: list[dict] = []

    def add(self, name: str, rehearsal: Rehearsal, **options) -> None:
        if rehearsal.model not in self.models:
            self.models[rehearsal.model] = save_tiny(rehearsal.model, self.root / "families" / rehearsal.model)
        layout, folder = rehearsal.layout, self.root / f"case {len(self._cases)}"
        changed = replace(layout, train={**layout.train, **TOKENS})
        config = write_config(folder, self.models[rehearsal.model], changed, dtype=rehearsal.dtype)
        case = {"out": str(self.root / name), "config": str(config), "ledger": str(self.ledger), "world": layout.num_processes}
        self._cases.append(case | rehearsal.options | options)

    def run(self) -> None:
        path = self.root / "cases.json"
        path.write_text(json.dumps(self._cases))
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(WORKER.parent), *sys.path])}
        done = subprocess.run([sys.executable, str(WORKER), str(path)], env=env, capture_output=True, text=True, timeout=1500)
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


def rehearse(tmp_path_factory, models, ledger, rehearsals: dict[str, Rehearsal], faults: list[str]) -> Stage:
    stage = Stage(tmp_path_factory.mktemp("rehearsal"), models, ledger)
    for model, dtype in {(rehearsal.model, rehearsal.dtype) for rehearsal in rehearsals.values()}:
        stage.add(f"CPU {model} {dtype}", Rehearsal(dtype=dtype, model=model), device="cpu", stages="updates")
    for name, rehearsal in rehearsals.items():
        stage.add(name, rehearsal)
    for fault in faults:
        stage.add(fault, Rehearsal(), fault=fault, stages="updates")
    stage.run()
    return stage


@pytest.fixture(scope="module")
def quick(tmp_path_factory, models, mixed_ledger) -> Stage:
    return rehearse(tmp_path_factory, models, mixed_ledger, QUICK, [*FAULTS, "an item in every micro-batch"])


@pytest.fixture(scope="module")
def more(tmp_path_factory, models, mixed_ledger) -> Stage:
    return rehearse(tmp_path_factory, models, mixed_ledger, MORE, [])


def check(stage: Stage, name: str, rehearsal: Rehearsal) -> None:
    ranks = stage.ranks(name, rehearsal.layout.num_processes)
    reference = f"CPU {rehearsal.model} {rehearsal.dtype}"
    (of_cpu,) = stage.ranks(reference)
    assert stage.distance(name, reference, rehearsal.model) <= DISTANCE[rehearsal.dtype]
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

    The optimizer's gradient norm is Megatron's wait; state that returns to host memory is one more of ours.
    """
    for rank in stage.ranks(name, rehearsal.layout.num_processes):
        for waits, allowed in ((rank["prepare_syncs"], 1), *((syncs, 1) for syncs in rank["update_syncs"])):
            ours = [wait for wait in waits if wait["is_ours"]]
            assert [wait for wait in ours if wait["in_schedule"]] == []
            parking = [wait for wait in ours if wait["file"].endswith("offload.py")]
            assert sum(wait["count"] for wait in ours) - sum(wait["count"] for wait in parking) <= allowed, ours
            assert sum(wait["count"] for wait in parking) <= bool(rehearsal.layout.optimizer)


@pytest.mark.parametrize("name", QUICK)
def test_a_training_step_equals_the_cpu_s(quick, name):
    check(quick, name, QUICK[name])


@pytest.mark.parametrize("name", QUICK)
def test_the_host_never_waits_for_the_device_within_a_micro_batch(quick, name):
    check_waits(quick, name, QUICK[name])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(quick, fault):
    kind, text = quick.fault(fault)
    assert kind == FAULTS[fault], text[-2000:]


def test_a_planted_wait_in_the_loop_is_counted(quick):
    (rank,) = quick.ranks("an item in every micro-batch")
    inside = [wait for syncs in rank["update_syncs"] for wait in syncs if wait["is_ours"] and wait["in_schedule"]]
    assert sum(wait["count"] for wait in inside) == rank["num_micro_batches"]


@pytest.mark.slow
@pytest.mark.timeout(1600)  # the first one runs all cases
@pytest.mark.parametrize("name", MORE)
def test_every_layout_dtype_and_family_equals_the_cpu_s(more, name):
    check(more, name, MORE[name])
    if "moe" not in name:  # Megatron asks the device how many tokens each expert has
        check_waits(more, name, MORE[name])
