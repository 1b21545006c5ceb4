"""Layouts, all of them."""

from nft_megatron.plan.hardware import ACCELERATORS
from nft_megatron.plan.layouts import Cluster
from nft_megatron.plan.models import PUBLIC_MODELS
from nft_megatron.plan.search import candidates, search
from nft_megatron.plan.workload import Assumptions

SHAPE = PUBLIC_MODELS["Qwen2.5-7B"]


def test_all_that_fit_are_within_the_reserve_and_fastest_first(make_config):
    cluster = Cluster(ACCELERATORS["h100"], 8, 16, 16)
    found = search(make_config(), SHAPE, cluster, Assumptions())
    seconds = [plan.time.total for plan in found.fitting]
    assert seconds == sorted(seconds)
    assert max(stage.passes for plan in found.fitting for stage in plan.stages) <= 0.9 * 79.1 * 2**30
    assert max(stage.update for plan in found.fitting for stage in plan.stages) <= 0.95 * 79.1 * 2**30
    assert all(plan.layout.num_gpus == 16 for plan in found.fitting)
    assert len(found.fitting) + sum(found.refused.values()) == len(list(candidates(make_config(), SHAPE, cluster)))


def test_what_is_refused_has_its_reason(make_config):
    found = search(make_config(), SHAPE, Cluster(ACCELERATORS["h100"], 8, 16, 16), Assumptions())
    assert found.refused["parallel.tensor does not divide the model's 28 attention heads"] > 0  # tensor 8
    assert found.refused["more than 90% of the memory with model.recompute = none"] > 0
    assert all(plan.layout.tensor in (1, 2, 4) for plan in found.fitting)


def test_candidates_are_every_way_to_cut_this_model_once(make_config):
    layouts = list(candidates(make_config(), SHAPE, Cluster(ACCELERATORS["h100"], 8, 8, 0)))
    assert len(set(layouts)) == len(layouts)
    kinds = {(each.tensor, each.pipeline, each.virtual_pipeline, each.context) for each in layouts}
    by_hand = {
        (tensor, pipeline, virtual, context)
        for tensor in (1, 2, 4, 8)
        for pipeline in (1, 2, 4)  # of the divisors of 28 those that divide 8 GPUs
        for context in (1, 2, 4, 8)
        if tensor * pipeline * context <= 8
        for virtual in {1: (1,), 2: (1, 2, 7), 4: (1, 7)}[pipeline]  # divisors of 14 and of 7, up to 8
    }
    assert kinds == by_hand
    assert len(layouts) == 3 * len(by_hand)


def test_nothing_fits_a_model_that_is_too_large(make_config):
    found = search(make_config(), PUBLIC_MODELS["Qwen2.5-72B"], Cluster(ACCELERATORS["h100"], 8, 8, 0), Assumptions())
    assert found.fitting == ()
    assert found.smallest > 0.9 * 79.1 * 2**30
