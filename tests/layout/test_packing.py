"""Invariants of packing under any lengths, ranks, budget and multiple."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nft_megatron.errors import UserError
from nft_megatron.layout.packing import Row, pack, plan_micro_batches, sequence_cost

answers = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 12)), max_size=40)
multiples = st.sampled_from([1, 2, 4, 6])


def make_rows(lengths):
    """Rows of given (prompt, answer) lengths whose tokens are all different, so that none can be mistaken for another."""
    fresh = itertools.count(1)
    return [Row(*(np.array([next(fresh) for _ in range(length)], dtype=np.int32) for length in pair)) for pair in lengths]


def loss_pairs(rows):
    """What must be trained on: (the token before, the answer token, its row), read off each row by itself."""
    for index, row in enumerate(rows):
        tokens = [*row.prompt_tokens.tolist(), *row.answer_tokens.tolist()]
        for t in range(len(row.prompt_tokens), len(tokens)):
            yield tokens[t - 1], tokens[t], index


@given(answers, st.integers(1, 5), multiples, st.integers(24, 60))
@settings(deadline=None, max_examples=200)
def test_every_loss_token_is_trained_on_exactly_once(lengths, num_ranks, multiple, budget):
    rows = make_rows(lengths)
    plan = plan_micro_batches([row.num_tokens for row in rows], token_budget=budget, num_ranks=num_ranks, multiple=multiple)
    seen = []
    for members in itertools.chain.from_iterable(plan):
        batch = pack([rows[i] for i in members], multiple=multiple)
        inputs = batch.input_ids_T[batch.loss_positions_N].tolist()
        seen += zip(inputs, batch.targets_N.tolist(), members[batch.row_N.numpy()].tolist(), strict=True)
    assert sorted(seen) == sorted(loss_pairs(rows))


@given(st.lists(st.integers(1, 24), max_size=60), st.integers(1, 5), multiples, st.integers(24, 80))
@settings(deadline=None, max_examples=200)
def test_plan_keeps_budget_counts_and_sequences(lengths, num_ranks, multiple, budget):
    plan = plan_micro_batches(lengths, token_budget=budget, num_ranks=num_ranks, multiple=multiple)
    assert len(plan) == num_ranks
    assert len({len(micro_batches) for micro_batches in plan}) == 1
    assert sorted(i for rank in plan for members in rank for i in members.tolist()) == list(range(len(lengths)))
    for micro_batches in plan:
        totals = [sum(lengths[i] for i in members) for members in micro_batches]
        assert all(-(-total // multiple) * multiple <= budget for total in totals)
        assert totals == sorted(totals, reverse=True)
        assert all(members.tolist() == sorted(members.tolist()) for members in micro_batches)
    again = plan_micro_batches(lengths, token_budget=budget, num_ranks=num_ranks, multiple=multiple)
    assert [[m.tolist() for m in rank] for rank in again] == [[m.tolist() for m in rank] for rank in plan]


def test_plan_spreads_sequences_that_would_fit_in_one_micro_batch():
    # 16 equal sequences, 2 ranks, room for all 16 in one pack: 8 each, not 16 and 0.
    plan = plan_micro_batches([1000] * 16, token_budget=16384, num_ranks=2)
    assert [[len(members) for members in rank] for rank in plan] == [[8], [8]]


def test_plan_evens_out_the_micro_batches_of_a_rank():
    # 25 sequences of 100 need 3 packs of at most 1000: 9 + 9 + 7, not 10 + 10 + 5.
    (rank,) = plan_micro_batches([100] * 25, token_budget=1000, num_ranks=1)
    assert [len(members) for members in rank] == [9, 9, 7]


def test_plan_gives_empty_micro_batches_to_ranks_without_work():
    plan = plan_micro_batches([5], token_budget=8, num_ranks=3)
    assert [[m.tolist() for m in rank] for rank in plan] == [[[0]], [[]], [[]]]


def test_plan_quality_on_long_tailed_answers():
    # What 32B training at 16K context needs: few padding tokens even if all packs get one total, and even ranks.
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(2900), 0.9, 8192), 50, 14336).astype(int)
    assert 3900 < lengths.mean() < 4300
    plan = plan_micro_batches(lengths, token_budget=16384, num_ranks=16, multiple=16, hidden_size=5120)
    assert lengths.sum() / (16384 * 16 * len(plan[0])) > 0.98
    linear_plus_attention = lengths * (24 * 5120**2 + 2 * 5120 * lengths)
    costs = np.array([sum(linear_plus_attention[members].sum() for members in rank) for rank in plan])
    assert costs.max() < 1.03 * costs.mean()


def test_a_sequence_over_the_budget_is_a_user_error():
    with pytest.raises(UserError, match=r"train\.micro_batch_tokens = 30.*33 tokens.*at least 36"):
        plan_micro_batches([5, 33], token_budget=30, num_ranks=2, multiple=4)
    with pytest.raises(UserError, match="multiples of 4"):
        plan_micro_batches([30], token_budget=30, num_ranks=1, multiple=4)  # 28 is all that fits in multiples of 4


def test_cost_is_proportional_to_the_flops_of_a_dense_layer():
    lengths, hidden = np.array([100, 4000, 14000]), 512
    flops = 24 * hidden**2 * lengths + 2 * hidden * lengths**2
    np.testing.assert_allclose(sequence_cost(lengths, hidden) / sequence_cost(lengths, hidden)[0], flops / flops[0])


def test_pack_by_hand():
    rows = [
        Row(np.array([11, 12, 13], dtype=np.int32), np.array([14, 15], dtype=np.int32)),
        Row(np.array([21], dtype=np.int32), np.array([22, 23, 24], dtype=np.int32)),
    ]
    batch = pack(rows, multiple=4)
    assert batch.input_ids_T.tolist() == [11, 12, 13, 14, 15, 21, 22, 23, 24, 0, 0, 0]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 5, 9, 12]
    assert batch.loss_positions_N.tolist() == [2, 3, 5, 6, 7]
    assert batch.targets_N.tolist() == [14, 15, 22, 23, 24]
    assert batch.row_N.tolist() == [0, 0, 1, 1, 1]
    assert batch.cu_seqlens.dtype == torch.int32
    integers = (batch.input_ids_T, batch.position_ids_T, batch.loss_positions_N, batch.targets_N, batch.row_N)
    assert {tensor.dtype for tensor in integers} == {torch.int64}


@pytest.mark.parametrize(("options", "total"), [({}, 9), ({"multiple": 6}, 12), ({"num_tokens": 20}, 20)])
def test_padding_is_a_last_sequence_of_its_own(options, total):
    batch = pack(make_rows([(3, 2), (1, 3)]), **options)
    assert len(batch.input_ids_T) == len(batch.position_ids_T) == total
    assert batch.cu_seqlens.tolist() == [0, 5, 9] + ([total] if total > 9 else [])
    assert batch.loss_positions_N.max().item() < 9


@pytest.mark.parametrize(("options", "total"), [({}, 1), ({"multiple": 8}, 8), ({"num_tokens": 16, "multiple": 8}, 16)])
def test_a_pack_of_nothing_has_tokens_but_no_loss(options, total):
    batch = pack([], **options)
    assert batch.cu_seqlens.tolist() == [0, total]
    assert batch.input_ids_T.tolist() == [0] * total
    assert len(batch.loss_positions_N) == len(batch.targets_N) == len(batch.row_N) == 0


def test_a_row_without_an_answer_has_no_loss_token():
    batch = pack(make_rows([(2, 3), (4, 0), (1, 2)]))
    assert batch.row_N.tolist() == [0, 0, 0, 2, 2]


def test_to_moves_every_tensor():
    batch = pack(make_rows([(2, 3)])).to("meta")
    assert {value.device.type for value in vars(batch).values() if isinstance(value, torch.Tensor)} == {"meta"}
