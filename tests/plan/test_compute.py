"""FLOPs, against those that torch counts while the real model runs."""

import plan_worker
import pytest

from nft_megatron.plan.compute import model_flops, stage_work
from nft_megatron.plan.models import PUBLIC_MODELS
from nft_megatron.plan.workload import Packs
from nft_megatron.weights import num_parameters

LENGTH, NUM_TOKENS = plan_worker.LENGTHS[0], sum(plan_worker.LENGTHS)
CAUSAL = (LENGTH + 1) / (2 * LENGTH)
"""Of a square of pairs, those that a causal mask leaves. Torch counts the square."""


def packs_of(lengths: list[int]) -> Packs:
    return Packs(1, sum(lengths), sum(n * (n + 1) // 2 for n in lengths), sum(lengths))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_flops_are_those_that_torch_counts(counted, make_layout, tensor: int, recompute: str):
    seen = counted(tensor)[f"bfloat16 {recompute}"]["flops"]
    work = stage_work(
        plan_worker.small_shape(2),
        make_layout(tensor=tensor, recompute=recompute),
        0,
        packs_of(plan_worker.LENGTHS),
        "bfloat16",
    )
    head = 2 * NUM_TOKENS * 64 * 320 / tensor
    assert seen["head"]["matmul"] == 3 * head
    assert work.logprobs.matmul == work.forward.matmul == seen["forward"]["matmul"] + head
    assert work.backward.matmul == seen["backward"]["matmul"] + 2 * head
    assert work.forward.attention == seen["forward"]["attention"] * CAUSAL
    assert work.backward.attention == pytest.approx(seen["backward"]["attention"] * CAUSAL)


def test_context_ranks_share_matrix_products(counted, make_layout):
    seen = counted(1, 2)["bfloat16 none"]["flops"]
    work = stage_work(plan_worker.small_shape(2), make_layout(context=2), 0, packs_of(plan_worker.LENGTHS), "bfloat16")
    assert work.forward.matmul + work.backward.matmul == sum(part["matmul"] for part in seen.values())


def test_stages_together_do_the_work_of_one(make_layout):
    shape, packs = plan_worker.small_shape(4), packs_of([100, 30])
    (whole,) = [stage_work(shape, make_layout(), 0, packs, "bfloat16")]
    parts = [stage_work(shape, make_layout(pipeline=4), stage, packs, "bfloat16") for stage in range(4)]
    assert sum(part.backward.flops for part in parts) == pytest.approx(whole.backward.flops)
    assert parts[3].forward.flops > parts[0].forward.flops  # the LM head


def test_model_flops_are_six_a_weight_and_token():
    """The usual estimate holds where attention is small: 6 · parameters · tokens, embedding left out."""
    shape = PUBLIC_MODELS["Qwen2.5-32B"]
    dense = num_parameters(shape) - shape.vocab_size * shape.hidden_size
    assert model_flops(shape, tokens=1000, pairs=0, positions=1000) == pytest.approx(6 * 1000 * dense, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Qwen2.5-0.5B", 494_032_768),
        ("Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen2.5-3B", 3_085_938_688),
        ("Qwen2.5-7B", 7_615_616_512),
        ("Qwen2.5-14B", 14_770_033_664),
        ("Qwen2.5-32B", 32_763_876_352),
        ("Qwen2.5-72B", 72_706_203_648),
        ("Qwen2.5-Math-1.5B", 1_543_714_304),
        ("Qwen2.5-Math-7B", 7_615_616_512),
    ],
)
def test_public_models_have_their_published_number_of_parameters(name: str, published: int):
    """As the safetensors files on the hub say."""
    assert num_parameters(PUBLIC_MODELS[name]) == published
