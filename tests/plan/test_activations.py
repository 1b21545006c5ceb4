"""What the formulas say the layers keep, against what autograd keeps."""

import plan_worker
import pytest

from nft_megatron.plan.activations import layer_bytes

NUM_TOKENS = sum(plan_worker.LENGTHS)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tensor", "context", "sequence_parallel"), [(1, 1, True), (2, 1, True), (2, 1, False), (1, 2, True)])
def test_a_layer_keeps_what_the_formula_says_to_the_byte(
    counted, make_layout, tensor: int, context: int, sequence_parallel: bool, dtype: str, recompute: str
):
    two, four = counted(tensor, context, sequence_parallel)[f"{dtype} {recompute}"]["saved"]
    element = {"float32": 4, "bfloat16": 2}[dtype]
    layout = make_layout(tensor=tensor, context=context, sequence_parallel=sequence_parallel)
    layer = layer_bytes(plan_worker.small_shape(2), layout, element, fused=False)
    # Torch's attention on the CPU also keeps a mask where a piece has more keys than queries: here 32 queries and 128 keys.
    mask = 32 * 128 * element if context == 2 and recompute != "full" else 0
    assert (four - two) / 2 == NUM_TOKENS / context * layer.kept(recompute) + mask


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_norms_of_queries_and_keys_are_counted(counted, make_layout, tensor: int, recompute: str):
    two, four = counted(tensor)[f"bfloat16 {recompute}"]["saved, q and k normed"]
    shape = plan_worker.small_shape(2, **plan_worker.QK_NORM)
    layer = layer_bytes(shape, make_layout(tensor=tensor), 2, fused=False)
    assert (four - two) / 2 == NUM_TOKENS * layer.kept(recompute)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_experts_are_counted(counted, make_layout, recompute: str):
    two, four = counted()[f"bfloat16 {recompute}"]["saved, experts"]
    layer = layer_bytes(plan_worker.small_shape(2, **plan_worker.EXPERTS), make_layout(), 2, fused=False)
    assert (four - two) / 2 == NUM_TOKENS * layer.kept(recompute)


def test_what_experts_store_is_counted_in_float32_too(counted, make_layout):
    kept = [counted()[f"float32 {recompute}"]["saved, experts"] for recompute in ("none", "selective")]
    everything, without = ((four - two) / 2 for two, four in kept)
    layer = layer_bytes(plan_worker.small_shape(2, **plan_worker.EXPERTS), make_layout(), 4, fused=False)
    assert everything - without == NUM_TOKENS * layer.mlp


def test_what_is_not_kept_is_made_again(make_layout):
    for fused in (True, False):
        layer = layer_bytes(plan_worker.small_shape(2), make_layout(), 2, fused=fused)
        assert layer.kept("selective") + layer.made_again("selective") == layer.kept("none")
        assert layer.made_again("none") == 0
        assert layer.made_again("full") == layer.kept("none") > layer.kept("selective") > layer.kept("full")
