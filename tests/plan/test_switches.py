"""What the speed switches change in a plan, against sums done by hand."""

from dataclasses import replace

import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.plan.command import _too_large
from nft_megatron.plan.compute import head_passes, stage_work
from nft_megatron.plan.estimate import check_model, plan_training
from nft_megatron.plan.hardware import ACCELERATORS, ACHIEVABLE
from nft_megatron.plan.layouts import Cluster, cluster_of, layout_of
from nft_megatron.plan.memory import stage_memory, stage_numel
from nft_megatron.plan.models import PUBLIC_MODELS
from nft_megatron.plan.search import search
from nft_megatron.plan.switches import Switches
from nft_megatron.plan.time import train_time
from nft_megatron.plan.workload import Assumptions, Packs, workload_of
from nft_megatron.weights.shape import Experts

SHAPE = PUBLIC_MODELS["Qwen2.5-7B"]
CLUSTER = Cluster(ACCELERATORS["h100"], 8, 8, 0)
PACKS = Packs(4, 65536, 10**8, 40000)
MEMORY = {"dtype": "bfloat16", "on_gpu": True, "num_micro_batches": 32}


def seconds(layout, switches: Switches = Switches(), num_updates: int = 1):  # noqa: B008 (frozen)
    return train_time(
        SHAPE, layout, CLUSTER, PACKS, num_updates=num_updates, dtype="bfloat16", cpu_offload=0.0, switches=switches
    )


def test_the_configuration_turns_them_on(make_config):
    assert Switches.of(make_config(), on_gpu=True) == Switches()
    config = make_config(
        kernels={
            "gradient_accumulation_fusion": False,
            "fused_lm_head": False,
            "overlap_parameter_gather": True,
            "overlap_tensor_communication": True,
        },
        optimizer={"first_moment": "bfloat16", "second_moment": "bfloat16", "beta2": 0.95},
        parallel={"tensor": 4},
        train={"pad_to_budget": True},
    )
    on_gpu = Switches(False, False, True, True, 4)
    assert Switches.of(config, on_gpu=True) == on_gpu
    assert Switches.of(config, on_gpu=False) == replace(on_gpu, fused_gradients=True, fused_head=True)


def test_moments_in_bfloat16_save_two_bytes_each(make_layout):
    layout = make_layout()
    numel = stage_numel(SHAPE, layout, 0, on_gpu=True)
    stages = [stage_memory(SHAPE, layout, 0, **MEMORY, switches=Switches(moment_bytes=count)) for count in (8, 6, 4)]
    assert [stage.optimizer for stage in stages] == [12 * numel, 10 * numel, 8 * numel]
    one, other = (seconds(layout, Switches(moment_bytes=count)).optimizer for count in (8, 4))
    assert one - other == pytest.approx(2 * 4 * numel / (3.35e12 * ACHIEVABLE.memory))  # read and written


def test_gathered_weights_hide_behind_the_next_forward_pass_but_for_the_last_update(make_layout):
    layout = make_layout(data=8)
    gathering = 2 * stage_numel(SHAPE, layout, 0, on_gpu=True) * 7 / 8 / (450e9 * ACHIEVABLE.node)
    before, after = (seconds(layout, Switches(overlapped_gathering=on), num_updates=3) for on in (False, True))
    assert before.data_communication == pytest.approx(3 * gathering)
    first_pack = before.forward / 3 / PACKS.num_micro_batches
    assert first_pack > gathering
    assert after.data_communication == pytest.approx(gathering)
    assert before.total - after.total == pytest.approx(2 * gathering)


def test_overlapped_tensor_communication_leaves_a_piece_and_costs_buffers(make_layout):
    layout = make_layout(tensor=4, micro_batch_tokens=16384)
    before, after = (seconds(layout, Switches(overlapped_tensor=on)) for on in (False, True))
    assert after.tensor_communication == pytest.approx(before.tensor_communication / 4)
    on, off = (stage_memory(SHAPE, layout, 0, **MEMORY, switches=Switches(overlapped_tensor=on)) for on in (True, False))
    assert on.peak - off.peak == 12 * 2 * 16384 * 3584


def test_communication_that_products_do_not_cover_is_waited_for(make_layout):
    """On cards so slow that they take longer than all products."""
    gpu = replace(ACCELERATORS["h100"], node_bandwidth=1e9)
    layout, packs = make_layout(tensor=2), Packs(1, 1000, 10**5, 500)

    def waited(on: bool) -> float:
        time = train_time(
            SHAPE,
            layout,
            replace(CLUSTER, gpu=gpu),
            packs,
            num_updates=1,
            dtype="bfloat16",
            cpu_offload=0.0,
            switches=Switches(overlapped_tensor=on),
        )
        return time.tensor_communication

    work = stage_work(SHAPE, layout, 0, packs, "bfloat16")
    products = (work.forward.matmul + work.backward.matmul) / (989.4e12 * ACHIEVABLE.matmul)
    assert waited(False) - waited(True) == pytest.approx(products)


def test_bytes_a_logit_of_the_lm_head(make_layout):
    """In bfloat16 each product writes or reads 2; the kernels move 2 + 4, torch's operators 20 + 28, or 36 with the entropy."""
    positions, logits = 1000, 1000 * SHAPE.vocab_size
    for fused, entropy, sums, gradient in ((True, 2, 2, 4), (False, 36, 20, 28)):
        passes = head_passes(SHAPE, positions, 2, fused=fused)
        assert [each.bytes for each in passes] == [(2 + entropy) * logits, (2 + sums) * logits, (gradient + 4) * logits]
    layout = make_layout(micro_batch_tokens=65536)
    held = [stage_memory(SHAPE, layout, 0, **MEMORY, switches=Switches(fused_head=on)).lm_head for on in (True, False)]
    assert held[1] >= held[0]
    before, after = (seconds(layout, Switches(fused_head=on)) for on in (False, True))
    saved = (20 + 28 - 2 - 4) * PACKS.positions * SHAPE.vocab_size / (3.35e12 * ACHIEVABLE.memory)
    assert before.forward + before.backward - after.forward - after.backward == pytest.approx(saved)


def test_a_last_stage_with_fewer_layers_is_no_longer_the_slowest(make_layout):
    even, uneven = (make_layout(pipeline=4, last_stage_layers=count) for count in (None, 4))
    before, after = seconds(even), seconds(uneven)
    assert after.total < before.total
    layer = stage_work(SHAPE, even, 0, PACKS, "bfloat16").forward.scaled(1 / 7)
    assert stage_work(SHAPE, uneven, 0, PACKS, "bfloat16").forward.matmul == pytest.approx(8 * layer.matmul)
    assert stage_work(SHAPE, uneven, 3, PACKS, "bfloat16").forward.matmul == pytest.approx(
        4 * layer.matmul + 2 * PACKS.positions * 3584 * 152064
    )
    layers = [stage_memory(SHAPE, uneven, stage, **MEMORY).activations / (4 - stage) for stage in range(3)]
    assert layers == pytest.approx([layers[0]] * 3)
    assert str(uneven).startswith("tensor 1 x pipeline 4, 4 layers in the last stage x context 1")


def test_overlapped_tensor_communication_is_refused_for_experts(make_config):
    config = make_config(kernels={"overlap_tensor_communication": True}, parallel={"tensor": 2}, train={"pad_to_budget": True})
    check_model(config, SHAPE)
    with pytest.raises(UserError, match="is for the dense layers of Transformer Engine"):
        check_model(config, replace(SHAPE, experts=Experts(8, 2, 64, normalise_topk=True)))


def test_the_layout_that_is_offered_instead_has_even_stages(make_config):
    """An override that leaves the number of layers of an end would not fit it."""
    config = make_config(
        model={"path": "Qwen2.5-32B"},
        rollout={"max_answer_tokens": 3584},
        parallel={"pipeline": 2, "last_stage_layers": 30},
        train={"micro_batch_tokens": 8192},
        cluster={"trainer_nodes": 4},
    )
    cluster = cluster_of(config)
    shape, assumptions = PUBLIC_MODELS["Qwen2.5-32B"], Assumptions()
    plan = plan_training(config, shape, cluster, layout_of(config, cluster), workload_of(config, assumptions))
    assert not plan.fits
    remedy = _too_large(plan, search(config, shape, cluster, assumptions)).remedy
    assert "parallel.last_stage_layers=null" in remedy and "first_stage_layers" not in remedy
