"""What each rank of any layout holds of the answers: together everything, exactly once, in the right place."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nft_megatron.base.records import AnswerTokens
from nft_megatron.batching.context import context_shard, zigzag_index
from nft_megatron.batching.packing import pack, plan_micro_batches


def tokens_of(prompt, answer) -> AnswerTokens:
    """A record with these token ids; packing reads nothing else."""
    return AnswerTokens(np.array(prompt, dtype=np.int32), np.array(answer, dtype=np.int32), np.zeros(len(answer), np.float32))


def chunks_of(rank, size, lengths):
    """The definition: rank r has chunk r and chunk 2·size − 1 − r of every sequence."""
    starts = np.cumsum(lengths) - lengths
    for start, length in zip(starts, lengths, strict=True):
        chunk = length // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            yield range(start + number * chunk, start + (number + 1) * chunk)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.sampled_from([1, 2, 3, 4]))
def test_zigzag_index_is_its_definition(halves, size):
    lengths = [2 * size * half for half in halves]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    for rank in range(size):
        index = zigzag_index(cu_seqlens, rank, size)
        assert index.dtype == torch.int64
        assert index.tolist() == [t for chunk in chunks_of(rank, size, lengths) for t in chunk]


def test_one_rank_has_all_tokens_of_sequences_of_any_length():
    assert zigzag_index(torch.tensor([0, 3, 4, 9], dtype=torch.int32), 0, 1).tolist() == list(range(9))


def test_a_sequence_that_cannot_be_cut_evenly_is_rejected():
    with pytest.raises(AssertionError):
        zigzag_index(torch.tensor([0, 8, 14], dtype=torch.int32), 0, 2)


def test_shards_by_hand():
    answers = [tokens_of([11, 12], [13, 14, 15]), tokens_of([21], [22, 23, 24])]
    whole = pack(answers, multiple=4, sequence_multiple=4)  # 11 12 | 13 14 | 15 0 | 0 0 and 21 | 22 | 23 | 24
    first, first_kept = context_shard(whole, 0, 2)
    second, second_kept = context_shard(whole, 1, 2)
    assert first.input_ids_T.tolist() == [11, 12, 0, 0, 21, 24]
    assert second.input_ids_T.tolist() == [13, 14, 15, 0, 22, 23]
    assert first.position_ids_T.tolist() == [0, 1, 6, 7, 0, 3]
    assert second.position_ids_T.tolist() == [2, 3, 4, 5, 1, 2]
    assert first.cu_seqlens.tolist() == second.cu_seqlens.tolist() == [0, 8, 12]
    # 13 is predicted from 12 on the first rank, although it is on the second itself
    assert (first.loss_positions_N.tolist(), first.targets_N.tolist()) == ([1, 4], [13, 22])
    assert (second.loss_positions_N.tolist(), second.targets_N.tolist()) == ([0, 1, 4, 5], [14, 15, 23, 24])
    assert (first.answer_N.tolist(), second.answer_N.tolist()) == ([0, 1], [0, 0, 1, 1])
    assert (first_kept.tolist(), second_kept.tolist()) == ([0, 3], [1, 2, 4, 5])


def test_without_context_parallelism_the_shard_is_the_pack():
    whole = pack([tokens_of([1], [2, 3])])
    shard, kept_N = context_shard(whole, 0, 1)
    assert shard is whole
    assert kept_N.tolist() == [0, 1]


def test_an_empty_pack_has_shards_without_loss_tokens():
    for rank in range(2):
        shard, kept_N = context_shard(pack([], multiple=8, sequence_multiple=4), rank, 2)
        assert shard.input_ids_T.tolist() == [0] * 4
        assert len(kept_N) == len(shard.targets_N) == len(shard.loss_positions_N) == 0


@st.composite
def layouts(draw):
    """Rows (prompt tokens, answer tokens) of distinct tokens, none of them padding, and any layout that holds them."""
    lengths = draw(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 20)), max_size=24))
    groups = draw(st.one_of(st.none(), st.just([i // 3 for i in range(len(lengths))])))
    context, tensor = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    sequence_multiple = 2 * context if context > 1 else 1
    multiple = sequence_multiple * tensor
    needed = -(-3 * 32 // multiple) * multiple if groups else 32
    pad_to_budget = draw(st.booleans())
    extra = draw(st.integers(0, 40))
    return {
        "lengths": lengths,
        "groups": groups,
        "context": context,
        "sequence_multiple": sequence_multiple,
        "multiple": multiple,
        "num_ranks": draw(st.integers(1, 4)),
        "budget": needed + (extra * multiple if pad_to_budget else extra),
        "pad_to_budget": pad_to_budget,
        "count_multiple": draw(st.sampled_from([1, 2, 3])),
    }


def check_pack(shards, rows, case):
    """The shards of one pack on all context ranks, reassembled, are ``rows`` end to end, correctly padded."""
    context = case["context"]
    (cu_seqlens,) = {tuple(shard.cu_seqlens.tolist()) for shard in shards}
    lengths, total = np.diff(cu_seqlens), cu_seqlens[-1]
    assert total % case["multiple"] == 0 and total <= case["budget"]
    assert total == case["budget"] or not case["pad_to_budget"]
    assert all(length % case["sequence_multiple"] == 0 for length in lengths)
    assert {len(shard.input_ids_T) for shard in shards} == {len(shard.position_ids_T) for shard in shards} == {total // context}

    tokens, positions = {}, {}
    for rank, shard in enumerate(shards):
        spans = [range(total)] if context == 1 else chunks_of(rank, context, lengths)
        for place, token, position in zip(
            itertools.chain(*spans), shard.input_ids_T.tolist(), shard.position_ids_T.tolist(), strict=True
        ):
            assert place not in tokens
            tokens[place], positions[place] = token, position
    for number, (start, length) in enumerate(zip(cu_seqlens, lengths, strict=False)):
        own = rows[number] if number < len(rows) else []
        assert [tokens[start + t] for t in range(length)] == own + [0] * (length - len(own))
        assert [positions[start + t] for t in range(length)] == list(range(length))
        assert number >= len(rows) or length - len(own) < case["sequence_multiple"]
    assert len(rows) <= len(lengths) <= len(rows) + 1


@given(layouts())
@settings(deadline=None, max_examples=200)
def test_the_ranks_of_any_layout_hold_every_loss_token_once_and_nothing_else(case):
    fresh = itertools.count(1)
    rows = [tuple([next(fresh) for _ in range(length)] for length in pair) for pair in case["lengths"]]
    weight_of = {(row, t): 0.5 + next(fresh) for row, (_, answer) in enumerate(rows) for t in range(len(answer))}
    # (row, answer position, target, weight, the token before, its position), with rows in their original order
    expected = Counter(
        (row, t, answer[t], weight_of[row, t], (prompt + answer)[len(prompt) + t - 1], len(prompt) + t - 1)
        for row, (prompt, answer) in enumerate(rows)
        for t in range(len(answer))
    )
    answer_position = {token: t for _, answer in rows for t, token in enumerate(answer)}

    plan = plan_micro_batches(
        [sum(pair) for pair in case["lengths"]],
        token_budget=case["budget"],
        num_ranks=case["num_ranks"],
        multiple=case["multiple"],
        sequence_multiple=case["sequence_multiple"],
        count_multiple=case["count_multiple"],
        groups=case["groups"],
    )
    seen = Counter()
    for members in (members.tolist() for rank in plan for members in rank):
        whole = pack(
            [tokens_of(*rows[i]) for i in members],
            multiple=case["multiple"],
            sequence_multiple=case["sequence_multiple"],
            num_tokens=case["budget"] if case["pad_to_budget"] else None,
        )
        weight_N = torch.tensor([weight_of[i, t] for i in members for t in range(len(rows[i][1]))], dtype=torch.float64)
        shards = [context_shard(whole, rank, case["context"]) for rank in range(case["context"])]
        check_pack([shard for shard, _ in shards], [prompt + answer for prompt, answer in (rows[i] for i in members)], case)
        for shard, kept_N in shards:
            assert shard.loss_positions_N.tolist() == sorted(shard.loss_positions_N.tolist())
            targets = shard.targets_N.tolist()
            seen += Counter(
                zip(
                    [members[row] for row in shard.answer_N.tolist()],
                    [answer_position[target] for target in targets],
                    targets,
                    weight_N[kept_N].tolist(),
                    shard.input_ids_T[shard.loss_positions_N].tolist(),
                    shard.position_ids_T[shard.loss_positions_N].tolist(),
                    strict=True,
                )
            )
    assert seen == expected
