"""How a step is split into mini-batches, and what a layout derives from its sizes."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nft_megatron.base.errors import UserError
from nft_megatron.batching.minibatches import BatchingRules, plan_minibatches, plan_recomputing
from nft_megatron.data.ledger import LedgerIndex

RULES = BatchingRules(
    num_updates=3,
    num_ranks=2,
    token_budget=64,
    hidden_size=8,
    denominator="tokens",
    seed=5,
    tensor_size=1,
    context_size=1,
    count_multiple=1,
    pad_to_budget=False,
    minibatch_of="questions",
)


def change(**fields) -> BatchingRules:
    return dataclasses.replace(RULES, **fields)


def index_of(group_id, prompt_length, answer_length) -> LedgerIndex:
    """Answers with only what matters to the plan."""
    others = {name: np.zeros(len(group_id)) for name in LedgerIndex.__dataclass_fields__}
    return LedgerIndex(**others | {"group_id": group_id, "prompt_length": prompt_length, "answer_length": answer_length})


@pytest.fixture
def answers() -> LedgerIndex:
    """8 groups of 4 answers in random order."""
    rng = np.random.default_rng(0)
    group_id = rng.permutation(np.repeat(np.arange(100, 108), 4))
    answer_length = rng.integers(1, 12, 32)
    return index_of(group_id, rng.integers(1, 4, 32), answer_length)


IS_FORWARDED = np.random.default_rng(1).permutation(np.arange(32) % 4 > 0)
"""One answer in four is not."""


@pytest.mark.parametrize(
    ("context", "tensor", "sequence_multiple", "multiple"),
    [(1, 1, 1, 1), (1, 8, 1, 8), (2, 1, 4, 4), (2, 8, 4, 32), (4, 8, 8, 64)],
)
def test_the_multiples_of_sequences_and_packs(context, tensor, sequence_multiple, multiple):
    layout = change(context_size=context, tensor_size=tensor)
    assert (layout.sequence_multiple, layout.multiple) == (sequence_multiple, multiple)


def test_a_budget_that_no_pack_can_have_is_a_user_error():
    sizes = {"context_size": 2, "tensor_size": 8, "pad_to_budget": True}
    assert change(**sizes, token_budget=96).multiple == 32
    with pytest.raises(UserError, match=r"train\.micro_batch_tokens = 100: .* it must be a multiple of 32; use 96 or 128$"):
        change(**sizes, token_budget=100)
    with pytest.raises(UserError, match=r"use 32$"):
        change(**sizes, token_budget=31)
    assert change(**(sizes | {"pad_to_budget": False}), token_budget=100).token_budget == 100  # packs then end below it


def members_of(plan) -> list[int]:
    return sorted(row for rank in plan.members_of for members in rank for row in members.tolist())


def test_mini_batches_share_out_the_groups_and_count_what_is_not_forwarded(answers):
    plans = plan_minibatches(answers, IS_FORWARDED, 7, RULES)
    parts = np.array_split(np.random.default_rng([5, 7]).permutation(np.arange(100, 108)), 3)  # by (seed, step)
    assert [len(part) for part in parts] == [3, 3, 2]
    for plan, part in zip(plans, parts, strict=True):
        members = [row for row in range(32) if answers.group_id[row] in part]
        assert members_of(plan) == [row for row in members if IS_FORWARDED[row]]
        assert plan.denominator == sum(answers.answer_length[row] for row in members)
        assert plan.num_tokens == sum(answers.answer_length[row] for row in members if IS_FORWARDED[row])


def test_answers_are_dealt_out_one_by_one(answers):
    """Whatever their question, by a permutation of (seed, step); an empty one is in no mini-batch."""
    answers.answer_length[[3, 30]] = 0
    plans = plan_minibatches(answers, IS_FORWARDED, 7, change(minibatch_of="answers"))
    order = np.random.default_rng([5, 7]).permutation([row for row in range(32) if row not in (3, 30)])
    assert [len(part) for part in np.array_split(order, 3)] == [10, 10, 10]
    for plan, part in zip(plans, np.array_split(order, 3), strict=True):
        assert members_of(plan) == sorted(row for row in part.tolist() if IS_FORWARDED[row])
        assert plan.denominator == answers.answer_length[part].sum()
        assert len(set(answers.group_id[part].tolist())) > 3
    few = index_of(np.zeros(2, int), np.array([1, 1]), np.array([4, 4]))
    assert len(plan_minibatches(few, np.array([True, True]), 7, change(minibatch_of="answers"))) == 2


@pytest.mark.parametrize("minibatch_of", ["answers", "questions"])
@pytest.mark.parametrize(
    "fields",
    [
        {"num_ranks": 5},
        {"token_budget": 200},
        {"context_size": 4, "tensor_size": 2},
        {"count_multiple": 4, "pad_to_budget": True},
        {"keep_groups": True},
    ],
)
def test_no_layout_changes_the_mini_batches(answers, fields, minibatch_of):
    if "keep_groups" in fields and minibatch_of == "answers":
        return  # refused by the configuration
    rules = change(minibatch_of=minibatch_of)
    usual, other = (plan_minibatches(answers, IS_FORWARDED, 7, each) for each in (rules, dataclasses.replace(rules, **fields)))
    assert [(members_of(p), p.denominator, p.num_tokens) for p in other] == [
        (members_of(p), p.denominator, p.num_tokens) for p in usual
    ]


def test_an_empty_answer_counts_for_nothing(answers):
    """Not even as a group if all of its answers are empty."""
    answers.answer_length[answers.group_id == 103] = 0
    answers.answer_length[0] = 0
    has_tokens = answers.answer_length > 0
    plans = plan_minibatches(answers, IS_FORWARDED, 7, change(num_updates=8, denominator="sequences"))
    assert len(plans) == 7
    assert sorted(row for plan in plans for row in members_of(plan)) == np.flatnonzero(IS_FORWARDED & has_tokens).tolist()
    assert sum(plan.denominator for plan in plans) == has_tokens.sum()


def test_the_plan_allows_for_padding_of_sequences():
    two = index_of(np.array([1, 1]), np.array([1, 1]), np.array([4, 4]))
    for context, expected in ((1, [[0, 1]]), (2, [[0], [1]])):  # 5 + 5 tokens, or 8 + 8
        (plan,) = plan_minibatches(two, np.array([True, True]), 1, change(num_ranks=1, token_budget=12, context_size=context))
        assert [members.tolist() for members in plan.members_of[0]] == expected


def test_groups_stay_whole_and_counts_are_multiples_if_required(answers):
    def homes(rules):
        """For every mini-batch: the number of micro-batches each group is in, and the number on each rank."""
        for plan in plan_minibatches(answers, IS_FORWARDED, 7, rules):
            places = [members for rank in plan.members_of for members in rank]
            groups = [set(answers.group_id[members].tolist()) for members in places]
            yield {group: sum(group in each for each in groups) for group in set().union(*groups)}, [*map(len, plan.members_of)]

    whole = list(homes(change(keep_groups=True, count_multiple=4)))
    assert all(set(counts.values()) == {1} and lengths == [4, 4] for counts, lengths in whole)
    assert any(max(counts.values()) > 1 for counts, _ in homes(RULES))  # without keep_groups, not all are


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 3), st.integers(0, 100))
def test_the_pass_for_old_logprobs_covers_every_current_answer_and_is_as_long_on_all_ranks(seed, ranks, multiple, percent):
    rng = np.random.default_rng(seed)
    num = int(rng.integers(1, 60))
    answers = index_of(np.arange(num) // 4, rng.integers(1, 4, num), rng.integers(1, 12, num))
    is_stale = rng.integers(0, 100, num) < percent
    rules = change(num_ranks=ranks, count_multiple=multiple, token_budget=24)
    plans = plan_minibatches(answers, np.ones(num, dtype=bool), 7, rules)
    of_rank = [plan_recomputing(plans, is_stale, rank, rules) for rank in range(ranks)]
    counts, required = set(), []
    for rank, chosen in enumerate(of_rank):
        packs = [pack.tolist() for plan in plans for pack in plan.members_of[rank]]
        flat = [each for minibatch in chosen for each in minibatch]
        assert [len(minibatch) for minibatch in chosen] == [len(plan.members_of[rank]) for plan in plans]
        needed = [any(not is_stale[row] for row in pack) for pack in packs]
        assert all(each or not need for each, need in zip(flat, needed, strict=True))
        counts.add(sum(flat))
        required.append(sum(needed))
    assert counts == {math.ceil(max(required) / multiple) * multiple}
    of_engine = plan_recomputing(plans, is_stale, 0, dataclasses.replace(rules, old_logprobs="engine"))
    assert not any(map(any, of_engine))
