"""Plans and packs under any lengths, ranks, budgets and multiples. What each rank then holds of a pack: test_context.py."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import AnswerTokens
from nft_megatron.batching.packing import pack, plan_micro_batches, sequence_cost


def tokens_of(prompt, answer) -> AnswerTokens:
    """A record with these token ids; packing reads nothing else."""
    return AnswerTokens(np.array(prompt, dtype=np.int32), np.array(answer, dtype=np.int32), np.zeros(len(answer), np.float32))


def make_answers(lengths):
    """Answers with the given (prompt, answer) lengths."""
    return [tokens_of(np.arange(1, 1 + prompt), np.arange(50, 50 + answer)) for prompt, answer in lengths]


def round_up(number, multiple):
    return -(-number // multiple) * multiple


@st.composite
def plans(draw):
    """Lengths in groups, and a budget that the largest group or sequence fits, tightly or loosely."""
    groups = draw(st.lists(st.lists(st.integers(1, 24), min_size=1, max_size=6), max_size=12))
    order = draw(st.permutations([(number, length) for number, group in enumerate(groups) for length in group]))
    sequence_multiple = draw(st.sampled_from([1, 2, 4, 8]))
    multiple = sequence_multiple * draw(st.sampled_from([1, 2, 3]))
    keep_groups = draw(st.booleans())
    padded = [[round_up(length, sequence_multiple) for length in group] for group in groups]
    largest = max([sum(group) if keep_groups else max(group) for group in padded], default=1)
    return [length for _, length in order], {
        "token_budget": round_up(largest, multiple) + draw(st.integers(0, 60)),
        "num_ranks": draw(st.integers(1, 5)),
        "multiple": multiple,
        "sequence_multiple": sequence_multiple,
        "count_multiple": draw(st.sampled_from([1, 2, 3, 4])),
        "groups": [number for number, _ in order] if keep_groups else None,
        "hidden_size": draw(st.sampled_from([1, 5120])),
    }


@given(plans())
@settings(deadline=None, max_examples=200)
def test_plan_keeps_budget_counts_groups_and_every_sequence(case):
    lengths, options = case
    plan = plan_micro_batches(lengths, **options)
    assert len(plan) == options["num_ranks"]
    assert {len(rank) for rank in plan} == {len(plan[0])}
    assert len(plan[0]) % options["count_multiple"] == 0
    assert sorted(i for rank in plan for members in rank for i in members.tolist()) == list(range(len(lengths)))
    padded = [round_up(length, options["sequence_multiple"]) for length in lengths]
    for rank in plan:
        totals = [sum(padded[i] for i in members) for members in rank]
        assert all(round_up(total, options["multiple"]) <= options["token_budget"] for total in totals)
        costs = [sum(padded[i] * (12 * options["hidden_size"] + padded[i]) for i in members) for members in rank]
        assert costs == sorted(costs, reverse=True)
        assert all(members.tolist() == sorted(members.tolist()) for members in rank)
    if options["groups"]:
        home = {}
        for place, members in enumerate(members for rank in plan for members in rank):
            for i in members:
                assert home.setdefault(options["groups"][i], place) == place
    again = plan_micro_batches(lengths, **options)
    assert [[m.tolist() for m in rank] for rank in again] == [[m.tolist() for m in rank] for rank in plan]


@given(plans())
@settings(deadline=None, max_examples=60)
def test_no_more_micro_batches_than_twice_the_tokens_need(case):
    """Best fit leaves at most one pack per rank half empty or emptier, so packs < 2 · tokens / budget + 1 on every rank."""
    lengths, options = case
    plan = plan_micro_batches(lengths, **options)
    budget = options["token_budget"] // options["multiple"] * options["multiple"]
    padded = [round_up(length, options["sequence_multiple"]) for length in lengths]
    most = max(sum(padded[i] for members in rank for i in members) for rank in plan)
    assert len(plan[0]) <= round_up(max(1, int(np.ceil(2 * most / budget))), options["count_multiple"])


def test_plan_spreads_sequences_that_would_fit_in_one_micro_batch():
    # 16 equal sequences, 2 ranks, room for all 16 in one pack: 8 on each rank, not 16 and 0.
    plan = plan_micro_batches([1000] * 16, token_budget=16384, num_ranks=2)
    assert [[len(members) for members in rank] for rank in plan] == [[8], [8]]


def test_plan_evens_out_the_micro_batches_of_a_rank():
    # 25 sequences of 100 need 3 packs of at most 1000: 9 + 9 + 7, not 10 + 10 + 5.
    (rank,) = plan_micro_batches([100] * 25, token_budget=1000, num_ranks=1)
    assert [len(members) for members in rank] == [9, 9, 7]


def test_plan_evens_out_a_rounded_up_number_of_micro_batches():
    # 3 would do, 4 are required: 7 + 7 + 7 + 4, not 9 + 9 + 7 + 0.
    (rank,) = plan_micro_batches([100] * 25, token_budget=1000, num_ranks=1, count_multiple=4)
    assert [len(members) for members in rank] == [7, 7, 7, 4]


def test_padding_of_sequences_counts_against_the_budget():
    # 4 sequences of 5 are 20 tokens, but 32 once each is padded to 8: two packs of 24, not one.
    (rank,) = plan_micro_batches([5] * 4, token_budget=24, num_ranks=1, multiple=8, sequence_multiple=8)
    assert [len(members) for members in rank] == [2, 2]


def test_cost_decides_the_order_if_tokens_are_equal():
    # With hidden size 1 only attention counts: one sequence of 16 costs more than 4 of 4.
    (rank,) = plan_micro_batches([4, 4, 4, 4, 16], token_budget=16, num_ranks=1, hidden_size=1)
    assert [members.tolist() for members in rank] == [[4], [0, 1, 2, 3]]


def test_plan_gives_empty_micro_batches_to_ranks_without_work():
    plan = plan_micro_batches([5], token_budget=8, num_ranks=3)
    assert [[m.tolist() for m in rank] for rank in plan] == [[[0]], [[]], [[]]]


def test_plan_quality_on_long_tailed_answers():
    # What 32B training at 16K context needs: little padding even if all packs have the same length, and balanced ranks.
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(2900), 0.9, 8192), 50, 14336).astype(int)
    assert 3900 < lengths.mean() < 4300
    plan = plan_micro_batches(lengths, token_budget=16384, num_ranks=16, multiple=16, hidden_size=5120)
    assert lengths.sum() / (16384 * 16 * len(plan[0])) > 0.98
    linear_plus_attention = lengths * (24 * 5120**2 + 2 * 5120 * lengths)
    costs = np.array([sum(linear_plus_attention[members].sum() for members in rank) for rank in plan])
    assert costs.max() < 1.03 * costs.mean()


def test_a_sequence_over_the_budget_is_a_user_error():
    with pytest.raises(UserError, match=r"train\.micro_batch_tokens = 30.*33 tokens.*at least 36.*rollout\.max_answer_tokens$"):
        plan_micro_batches([5, 33], token_budget=30, num_ranks=2, multiple=4)
    with pytest.raises(UserError, match="multiples of 4"):
        plan_micro_batches([30], token_budget=30, num_ranks=1, multiple=4)  # the most that fits in multiples of 4 is 28


def test_a_group_over_the_budget_is_a_user_error():
    options = {"token_budget": 32, "num_ranks": 1, "multiple": 8, "sequence_multiple": 4}
    lengths, groups = [9, 9, 9, 30], [3, 3, 3, 1]  # 3 · 12 = 36 tokens with padding
    assert len(plan_micro_batches(lengths, **options)[0]) == 3
    with pytest.raises(
        UserError, match=r"train\.micro_batch_tokens = 32.*one question.*36 tokens.*at least 40.*rollout\.group_size"
    ):
        plan_micro_batches(lengths, groups=groups, **options)


def test_cost_is_proportional_to_the_flops_of_a_dense_layer():
    lengths, hidden = np.array([100, 4000, 14000]), 512
    flops = 24 * hidden**2 * lengths + 2 * hidden * lengths**2
    np.testing.assert_allclose(sequence_cost(lengths, hidden) / sequence_cost(lengths, hidden)[0], flops / flops[0])


def test_pack_by_hand():
    batch = pack([tokens_of([11, 12, 13], [14, 15]), tokens_of([21], [22, 23, 24])], multiple=4)
    assert batch.input_ids_T.tolist() == [11, 12, 13, 14, 15, 21, 22, 23, 24, 0, 0, 0]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 5, 9, 12]
    assert batch.loss_positions_N.tolist() == [2, 3, 5, 6, 7]
    assert batch.targets_N.tolist() == [14, 15, 22, 23, 24]
    assert batch.answer_N.tolist() == [0, 0, 1, 1, 1]
    assert batch.cu_seqlens.dtype == torch.int32
    integers = (batch.input_ids_T, batch.position_ids_T, batch.loss_positions_N, batch.targets_N, batch.answer_N)
    assert {tensor.dtype for tensor in integers} == {torch.int64}


def test_pack_with_sequences_padded_by_hand():
    batch = pack([tokens_of([11, 12], [13, 14, 15]), tokens_of([21], [22, 23, 24])], multiple=8, sequence_multiple=4)
    assert batch.input_ids_T.tolist() == [11, 12, 13, 14, 15, 0, 0, 0, 21, 22, 23, 24, 0, 0, 0, 0]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 8, 12, 16]
    assert batch.loss_positions_N.tolist() == [1, 2, 3, 8, 9, 10]
    assert batch.targets_N.tolist() == [13, 14, 15, 22, 23, 24]
    assert batch.answer_N.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("options", "total"), [({}, 9), ({"multiple": 6}, 12), ({"num_tokens": 20}, 20)])
def test_padding_is_a_separate_last_sequence(options, total):
    batch = pack(make_answers([(3, 2), (1, 3)]), **options)
    assert len(batch.input_ids_T) == len(batch.position_ids_T) == total
    assert batch.cu_seqlens.tolist() == [0, 5, 9] + ([total] if total > 9 else [])
    assert batch.loss_positions_N.max().item() < 9


@pytest.mark.parametrize(("options", "total"), [({}, 1), ({"multiple": 8}, 8), ({"num_tokens": 16, "multiple": 8}, 16)])
def test_an_empty_pack_has_tokens_but_no_loss(options, total):
    batch = pack([], **options)
    assert batch.cu_seqlens.tolist() == [0, total]
    assert batch.input_ids_T.tolist() == [0] * total
    assert len(batch.loss_positions_N) == len(batch.targets_N) == len(batch.answer_N) == 0


def test_an_empty_answer_has_no_loss_token():
    batch = pack(make_answers([(2, 3), (4, 0), (1, 2)]))
    assert batch.answer_N.tolist() == [0, 0, 0, 2, 2]


def test_all_but_the_bounds_of_the_sequences_moves():
    batch = pack(make_answers([(2, 3), (1, 1)])).to(torch.device("meta"))
    devices = {name: value.device.type for name, value in vars(batch).items()}
    assert devices.pop("cu_seqlens") == "cpu"
    assert set(devices.values()) == {"meta"}
    assert batch.lengths == [5, 2]
