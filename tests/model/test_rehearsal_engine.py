"""The same with Transformer Engine's layers: its own Python, stand-ins for its kernels (rehearsal_engine.py)."""

import pytest
from recorded_step import LAYOUTS, Layout
from rehearsal_stage import SMALL_BUCKETS, Rehearsal, Stage, check, check_waits, has_engine, rehearse

NO_ENGINE = "Transformer Engine's Python is not installed: `make engine` (no GPU needed)"
pytestmark = pytest.mark.skipif(not has_engine(), reason=NO_ENGINE)
MODULES = {"LayerNormLinear", "Linear", "RMSNorm", "DotProductAttention"}
KERNELS = {"fused_rope_forward", "fused_rope_backward", "multi_tensor_l2norm", "multi_tensor_adam", "gradient accumulation"}
QUICK = {
    "bf16, several buckets": Rehearsal(options={"bucket": SMALL_BUCKETS}, engine=True),
    "context 2": Rehearsal(LAYOUTS["context 2"], options={"stages": "updates"}, engine=True),
    "tensor 2": Rehearsal(Layout(2, {"tensor": 2}), options={"stages": "updates"}, engine=True),
}
FAULT = "a tensor that was not moved"
FLOAT32 = Rehearsal(dtype="float32", options={"stages": "updates"}, engine=True)
MORE = {
    name: Rehearsal(LAYOUTS[name], model=model, engine=True)
    for name, model in (
        ("tensor 2", "untied"),
        ("pipeline 2, recompute layers", "tied"),
        ("pipeline 2 interleaved", "untied"),
        ("data 2, half of the optimizer on the host", "tied"),
        ("tensor 2 × pipeline 2 × context 2", "tied"),
    )
} | {family: Rehearsal(model=family, engine=True) for family in ("qwen3", "llama 3", "mistral", "qwen3_moe")}
MORE["qwen3_moe, expert 2"] = Rehearsal(Layout(2, {"expert": 2}), model="qwen3_moe", engine=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory, models, mixed_ledger) -> Stage:
    return rehearse(tmp_path_factory, models, mixed_ledger, QUICK | {"float32": FLOAT32}, [FAULT], engine=True)


@pytest.fixture(scope="module")
def more(tmp_path_factory, models, mixed_ledger) -> Stage:
    return rehearse(tmp_path_factory, models, mixed_ledger, MORE, [])


def check_layers(stage: Stage, name: str, rehearsal: Rehearsal) -> None:
    for rank in stage.ranks(name, rehearsal.layout.num_processes):
        assert rank["layers"] == "transformer_engine"
        assert not rank["stand_ins"].keys() < MODULES | KERNELS, rank["stand_ins"]


@pytest.mark.parametrize("name", QUICK)
def test_a_training_step_with_transformer_engine_equals_the_cpu_s(quick, name):
    check(quick, name, QUICK[name])
    check_layers(quick, name, QUICK[name])


@pytest.mark.parametrize("name", QUICK)
def test_the_host_never_waits_for_the_device_within_a_micro_batch(quick, name):
    check_waits(quick, name, QUICK[name])


def test_a_float32_model_keeps_megatron_s_layers(quick):
    check(quick, "float32", FLOAT32, largest=5e-5)  # another Adam rounds weights differently
    (rank,) = quick.ranks("float32")
    assert rank["layers"] == "local" and not MODULES & rank["stand_ins"].keys()


def test_bounds_of_sequences_in_host_memory_are_found(quick):
    kind, text = quick.fault(FAULT)
    assert kind == "DeviceMismatch" and "Transformer Engine was given a tensor" in text, text[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(1600)  # the first one runs all cases
@pytest.mark.parametrize("name", MORE)
def test_every_layout_and_family_equals_the_cpu_s(more, name):
    check(more, name, MORE[name])
    check_layers(more, name, MORE[name])
