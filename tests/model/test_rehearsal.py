"""Whole training steps on a pretended GPU (rehearsal_device.py): every place where host and device meet, no kernel."""

import pytest
from recorded_step import LAYOUTS, Layout
from rehearsal_stage import SMALL_BUCKETS, Rehearsal, Stage, check, check_waits, rehearse

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


@pytest.fixture(scope="module")
def quick(tmp_path_factory, models, mixed_ledger) -> Stage:
    return rehearse(tmp_path_factory, models, mixed_ledger, QUICK, [*FAULTS, "an item in every micro-batch"])


@pytest.fixture(scope="module")
def more(tmp_path_factory, models, mixed_ledger) -> Stage:
    return rehearse(tmp_path_factory, models, mixed_ledger, MORE, [])


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
