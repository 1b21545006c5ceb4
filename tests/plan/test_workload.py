"""What a step is assumed to train on, and how it is packed."""

import numpy as np
import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.batching.packing import plan_micro_batches
from nft_megatron.plan.models import PUBLIC_MODELS
from nft_megatron.plan.workload import Assumptions, pack_update, spread, workload_of

SHAPE = PUBLIC_MODELS["Qwen2.5-7B"]


@pytest.mark.parametrize(("mean", "limit"), [(100, 1000), (500, 1000), (900, 1000), (3584, 14336)])
def test_lengths_have_the_mean_that_was_asked_for_and_stay_within_the_limit(mean: int, limit: int):
    lengths = spread(2000, mean, limit)
    assert np.mean(lengths) == pytest.approx(mean, rel=0.01)
    assert 1 <= min(lengths) <= max(lengths) <= limit


def test_an_exponential_distribution_has_half_of_its_answers_below_ln_2_of_its_mean():
    assert np.median(spread(10_001, 1000, 100_000)) == pytest.approx(1000 * np.log(2), rel=0.001)


def test_a_step_asks_more_questions_where_fewer_are_mixed(make_config):
    work = workload_of(make_config(), Assumptions(answer_tokens=1000, mixed_share=0.25))
    assert (work.num_questions, work.num_asked) == (256, 2048)
    assert (work.num_updates, len(work.answer_lengths), work.prompt_tokens) == (4, 128, 128)
    assert workload_of(make_config(), Assumptions()).mean_answer == pytest.approx(3584 / 4, rel=0.01)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
def test_without_a_prompt_filter_a_step_asks_its_questions_and_forwards_the_mixed_ones(make_config, name):
    assumptions = Assumptions(mixed_share=0.25)
    work = workload_of(make_config(algorithm={"name": name}), assumptions)
    assert (work.num_questions, work.num_asked) == (64, 512)
    assert len(work.answer_lengths) == 512 / 4 * 0.25  # 512 answers in 4 updates
    filtered = workload_of(make_config(algorithm={"name": name}, rollout={"prompt_filter": True}), assumptions)
    assert (filtered.num_questions, len(filtered.answer_lengths)) == (256, 128)


@pytest.mark.parametrize(
    ("assumptions", "field"),
    [
        ({"mixed_share": 0.0}, "--mixed-share"),
        ({"mixed_share": 1.5}, "--mixed-share"),
        ({"answer_tokens": 0}, "--answer-tokens"),
    ],
)
def test_impossible_assumptions_are_refused(assumptions: dict, field: str):
    with pytest.raises(UserError) as caught:
        Assumptions(**assumptions)
    assert caught.value.field == field


def test_packs_are_those_of_the_busiest_rank(make_config, make_layout):
    config, layout = make_config(), make_layout(tensor=2, context=2, data=4, micro_batch_tokens=8192)
    work = workload_of(config, Assumptions())
    packs = pack_update(config, SHAPE, layout, work)
    lengths = np.array(work.answer_lengths) + work.prompt_tokens
    ranks = plan_micro_batches(
        lengths, token_budget=8192, num_ranks=4, multiple=8, sequence_multiple=4, hidden_size=SHAPE.hidden_size
    )
    padded = -(-lengths // 4) * 4
    sums = [
        (
            sum(-(-int(padded[pack].sum()) // 8) * 8 for pack in rank),
            sum(int(n * (n + 1) // 2) for pack in rank for n in padded[pack]),
            sum(int((lengths[pack] - work.prompt_tokens).sum()) for pack in rank),
        )
        for rank in ranks
    ]
    assert (packs.tokens, packs.pairs, packs.positions) in sums
    assert packs.num_micro_batches == len(ranks[0])
    costs = [tokens + pairs / (6 * SHAPE.hidden_size) for tokens, pairs, _ in sums]  # as `sequence_cost` weighs them
    assert packs.tokens + packs.pairs / (6 * SHAPE.hidden_size) == max(costs)


def test_packs_padded_to_the_budget_hold_it_and_the_interleaved_schedule_gets_a_multiple_of_its_stages(
    make_config, make_layout
):
    config = make_config(train={"pad_to_budget": True})
    layout = make_layout(pipeline=4, virtual_pipeline=7, data=2, micro_batch_tokens=8192)
    packs = pack_update(config, SHAPE, layout, workload_of(config, Assumptions()))
    assert packs.num_micro_batches % 4 == 0
    assert packs.tokens == packs.num_micro_batches * 8192


def test_rejection_sampling_forwards_right_answers_only(make_config, make_layout):
    layout = make_layout(data=2, micro_batch_tokens=8192)
    nft, rft = make_config(), make_config(algorithm={"name": "rft"})
    positions = [pack_update(each, SHAPE, layout, workload_of(each, Assumptions())).positions for each in (nft, rft)]
    assert positions[1] == pytest.approx(positions[0] / 2, rel=0.05)


def test_a_sequence_that_fits_into_no_pack_is_refused(make_config, make_layout):
    config = make_config(train={"micro_batch_tokens": 4100})
    layout = make_layout(tensor=4, context=4, micro_batch_tokens=4100)  # packs are multiples of 32: at most 4096
    assert pack_update(config, SHAPE, layout, workload_of(config, Assumptions())).num_micro_batches
    config = make_config(train={"micro_batch_tokens": 4100}, rollout={"max_answer_tokens": 3588})
    with pytest.raises(UserError, match="4104 tokens and packs are multiples of 32"):
        pack_update(config, SHAPE, layout, workload_of(config, Assumptions()))
