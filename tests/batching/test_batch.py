"""Under any layout, all ranks together read from a ledger exactly what its groups contain."""

import dataclasses
import itertools
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nft_megatron.algorithms import build_algorithm
from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Answer, Completion, Group, Prompt, Verdict
from nft_megatron.batching.batch import MiniBatch, pack_minibatches, plan_step
from nft_megatron.batching.minibatches import BatchingRules
from nft_megatron.data.ledger import open_ledger, write_ledger

STEP, SEED = 3, 11
CPU = torch.device("cpu")
ALGORITHMS = {
    "nft": build_algorithm(name="nft", epsilon=1.0, prompt_weight="one_minus_rate", negative_weight=1.0),
    "rft": build_algorithm(name="rft"),
    "dr_grpo": build_algorithm(name="dr_grpo"),
}
OMEGA = {"nft": lambda rate: 1 - rate, "rft": lambda rate: 1.0, "dr_grpo": lambda rate: 1.0}  # of a question's right share


def read_minibatches(ledger, step, algorithm, rules, data_rank, context_rank, device) -> list[MiniBatch]:
    """A rank's mini-batches, with its answers read by itself."""
    with open_ledger(ledger) as opened:
        plan = plan_step(opened.index(), step, algorithm, rules)
        positions = plan.positions_of(data_rank)
        tokens = dict(zip(positions.tolist(), opened.tokens(plan.index.row[positions]), strict=True))
    return pack_minibatches(plan, tokens, algorithm, rules, data_rank, context_rank, device)


def make_group(number, prompt_length, answers, fresh) -> Group:
    """All tokens of all groups differ, so none can be mistaken for another; so do the engine's log-probs."""

    def answer(index, length, label, version) -> Answer:
        tokens = np.array([next(fresh) for _ in range(length)], dtype=np.int32)
        completion = Completion(number, index, tokens, -(tokens / 1024).astype(np.float32), "stop", version, 0.0)
        return Answer(completion, "", Verdict(label, "", ""))

    prompt = Prompt(f"q{number}", "", "", np.array([next(fresh) for _ in range(prompt_length)], dtype=np.int32))
    return Group(number, STEP, prompt, tuple(answer(index, *each) for index, each in enumerate(answers)))


def one_rank(**fields) -> BatchingRules:
    """Rules of one rank and, unless ``fields`` say otherwise, one update."""
    return BatchingRules(
        **{
            "num_updates": 1,
            "num_ranks": 1,
            "hidden_size": 8,
            "denominator": "tokens",
            "seed": 0,
            "tensor_size": 1,
            "context_size": 1,
            "count_multiple": 1,
            "pad_to_budget": False,
            "minibatch_of": "questions",
            **fields,
        }
    )


labels = st.sampled_from(["correct", "wrong", "unknown"])
answers = st.lists(st.tuples(st.integers(0, 12), labels, st.integers(STEP - 3, STEP - 1)), min_size=1, max_size=5)


@st.composite
def cases(draw):
    context, tensor = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    keep_groups = draw(st.booleans())
    rules = BatchingRules(
        num_updates=draw(st.integers(1, 3)),
        num_ranks=draw(st.integers(1, 3)),
        # with padding, a sequence has at most 24 tokens and the 5 of a group 120; packs are multiples of at most 16
        token_budget=16 * draw(st.integers(8 if keep_groups else 2, 10)),
        hidden_size=8,
        denominator=draw(st.sampled_from(["tokens", "sequences", 100.0])),
        seed=SEED,
        tensor_size=tensor,
        context_size=context,
        count_multiple=draw(st.sampled_from([1, 2, 3])),
        pad_to_budget=draw(st.booleans()),
        minibatch_of="questions",
        keep_groups=keep_groups,
    )
    fresh = itertools.count(1)
    drawn = draw(st.lists(st.tuples(st.integers(1, 6), answers), min_size=1, max_size=6))
    groups = [make_group(number, *each, fresh) for number, each in enumerate(drawn)]
    fates = draw(st.lists(st.sampled_from(["train", "train", "surplus"]), min_size=len(groups), max_size=len(groups)))
    return groups, fates, rules, draw(st.sampled_from(sorted(ALGORITHMS)))


def judged(group):
    """The answers that count in D: judged and not empty."""
    return [a for a in group.answers if a.verdict.label != "unknown" and len(a.completion.tokens)]


def forwarded(groups, name):
    """The answers trained on, each with its group: right ones under RFT, those of mixed groups under Dr. GRPO."""
    kept = {
        "nft": lambda group, answer: True,
        "rft": lambda group, answer: answer.verdict.label == "correct",
        "dr_grpo": lambda group, answer: group.is_mixed,
    }[name]
    return [(g, a) for g in groups for a in judged(g) if kept(g, a)]


def expected_tokens(groups, denominator, name):
    """What every token of a mini-batch of ``groups`` must be trained with, derived only from the records."""
    kept = [answer for group in groups for answer in judged(group)]
    tokens = sum(len(answer.completion.tokens) for answer in kept)
    divisor = {"tokens": tokens, "sequences": len(kept)}.get(denominator, denominator)
    for group, answer in forwarded(groups, name):
        verdicts = [each.verdict.label for each in group.answers if each.verdict.label != "unknown"]
        rate = verdicts.count("correct") / len(verdicts)
        sequence = [*group.prompt.tokens.tolist(), *answer.completion.tokens.tolist()]
        for t in range(len(group.prompt.tokens), len(sequence)):
            yield {
                "target": sequence[t],
                "input": sequence[t - 1],
                "position": t - 1,
                "weight": float(np.float32(OMEGA[name](rate) / divisor)),
                "is_correct": answer.verdict.label == "correct",
                "correct_rate": float(np.float32(rate)),
                "engine_logprob": -sequence[t] / 1024,
                "advantage": float(np.float32((answer.verdict.label == "correct") - rate)) if name == "dr_grpo" else None,
                "is_stale": answer.completion.weight_version < STEP - 1,  # step k starts from version k − 1
            }


def read_tokens_of(micro_batch):
    packed = micro_batch.packed
    columns = {
        "target": packed.targets_N,
        "input": packed.input_ids_T[packed.loss_positions_N],
        "position": packed.position_ids_T[packed.loss_positions_N],
        "weight": micro_batch.weight_N,
        "is_correct": micro_batch.is_correct_N,
        "correct_rate": micro_batch.correct_rate_N,
        "engine_logprob": micro_batch.engine_logprob_N,
        "advantage": micro_batch.advantage_N,
        "is_stale": micro_batch.is_stale_N,
    }
    num = len(packed.targets_N)
    for row in zip(*([None] * num if column is None else column.tolist() for column in columns.values()), strict=True):
        yield dict(zip(columns, row, strict=True))


def count(tokens) -> Counter:
    return Counter(tuple(token.items()) for token in tokens)


def check_packs(packs, groups, rules, name):
    """``packs``: for every micro-batch on every data-parallel rank, the parts of all context-parallel ranks."""
    sequence_multiple = 2 * rules.context_size if rules.context_size > 1 else 1
    group_of = {token: g.group_id for g in groups for a in g.answers for token in a.completion.tokens.tolist()}
    lengths, homes = Counter(), Counter()
    for parts in packs:
        (cu_seqlens,) = {tuple(part.cu_seqlens.tolist()) for part in parts}
        total = cu_seqlens[-1]
        assert total == sum(len(part.input_ids_T) for part in parts) <= rules.token_budget
        assert total == rules.token_budget or not rules.pad_to_budget
        assert total % (sequence_multiple * rules.tensor_size) == 0
        lengths.update(np.diff(cu_seqlens).tolist())
        homes.update({group_of[token] for part in parts for token in part.targets_N.tolist()})
    real = [len(group.prompt.tokens) + len(answer.completion.tokens) for group, answer in forwarded(groups, name)]
    padded = Counter(-(-length // sequence_multiple) * sequence_multiple for length in real)
    assert padded <= lengths and (lengths - padded).total() <= len(packs)  # plus at most the padding of each pack
    assert not rules.keep_groups or set(homes.values()) <= {1}


@given(cases())
@settings(deadline=None, max_examples=60)
def test_all_ranks_together_read_every_token_once_with_its_values(case):
    groups, fates, rules, name = case
    trained = [group for group, fate in zip(groups, fates, strict=True) if fate == "train" and judged(group)]
    assume(trained)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / "ledger.parquet"
        write_ledger(ledger, groups, fates=fates, meta={})
        ranks = [
            [read_minibatches(ledger, STEP, ALGORITHMS[name], rules, data, c, CPU) for c in range(rules.context_size)]
            for data in range(rules.num_ranks)
        ]

    order = np.random.default_rng([SEED, STEP]).permutation([group.group_id for group in trained])
    parts = np.array_split(order, min(rules.num_updates, len(trained)))
    assert {len(minibatches) for contexts in ranks for minibatches in contexts} == {len(parts)}
    for number, part in enumerate(parts):
        members = [group for group in trained if group.group_id in part]
        expected = list(expected_tokens(members, rules.denominator, name))
        minibatches = [[each[number] for each in contexts] for contexts in ranks]
        assert {each.num_tokens for contexts in minibatches for each in contexts} == {len(expected)}
        (num_micro_batches,) = {len(each.micro_batches) for contexts in minibatches for each in contexts}
        assert num_micro_batches % rules.count_multiple == 0
        micro_batches = [
            [each.micro_batches[k] for each in contexts] for contexts in minibatches for k in range(num_micro_batches)
        ]
        seen = count(token for shards in micro_batches for shard in shards for token in read_tokens_of(shard))
        assert seen == count(expected)
        check_packs([[shard.packed for shard in shards] for shards in micro_batches], members, rules, name)


def test_answers_dealt_out_over_mini_batches_are_read_once_with_their_values(tmp_path):
    """Each token is the same as with whole questions, r̂ and ω of its group included; an unknown answer is nowhere."""
    fresh = itertools.count(1)
    verdicts = ["correct", "wrong", "unknown", "wrong", "correct"]
    groups = [make_group(n, 3, [(2 + n + k, verdicts[(n + k) % 5], 2) for k in range(4)], fresh) for n in range(5)]
    write_ledger(tmp_path / "ledger.parquet", groups, fates=["train"] * 5, meta={})
    rules = one_rank(num_updates=3, token_budget=128, minibatch_of="answers", denominator=100.0)
    minibatches = read_minibatches(tmp_path / "ledger.parquet", STEP, build_algorithm("nft"), rules, 0, 0, CPU)
    seen = [[token for pack in each.micro_batches for token in read_tokens_of(pack)] for each in minibatches]
    assert count(itertools.chain(*seen)) == count(expected_tokens(groups, 100.0, "nft"))
    group_of = {token: g.group_id for g in groups for a in g.answers for token in a.completion.tokens.tolist()}
    assert sum(len({group_of[token["target"]] for token in part}) for part in seen) > len(groups)  # groups are split
    first = {a.completion.tokens[0] for g in groups for a in judged(g)}
    assert [sum(token["target"] in first for token in part) for part in seen] == [6, 5, 5]


def test_a_group_too_long_for_a_micro_batch_is_reported(tmp_path):
    answers = [(40, "correct", 2), (40, "wrong", 2)]
    write_ledger(tmp_path / "ledger.parquet", [make_group(0, 10, answers, itertools.count(1))], fates=["train"], meta={})
    rules = one_rank(token_budget=96, keep_groups=True)
    with pytest.raises(UserError, match=r"train\.micro_batch_tokens = 96: .* have 100 tokens; raise it to at least 100"):
        read_minibatches(tmp_path / "ledger.parquet", STEP, ALGORITHMS["nft"], rules, 0, 0, CPU)


def test_inputs_of_a_loss_over_whole_answers_are_equal_on_all_context_ranks(tmp_path):
    """It agrees with each answer's tokens; answers to one question share a number, counted from 0 in every pack."""
    fresh = itertools.count(1)
    verdicts = ["correct", "wrong", "unknown", "wrong", "correct"]
    groups = [make_group(n, 3, [(2 + n + k, verdicts[(n + k) % 5], 2) for k in range(4)], fresh) for n in range(5)]
    ledger = tmp_path / "ledger.parquet"
    write_ledger(ledger, groups, fates=["train"] * 5, meta={})
    rules = one_rank(num_updates=2, token_budget=128, context_size=2, keep_groups=True)
    group_of = {token: g.group_id for g in groups for a in g.answers for token in a.completion.tokens.tolist()}
    first, second = (
        read_minibatches(ledger, STEP, build_algorithm("infonca"), rules, 0, context_rank, CPU) for context_rank in range(2)
    )
    seen = 0
    for pack, other in (
        (m, o) for a, b in zip(first, second, strict=True) for m, o in zip(a.micro_batches, b.micro_batches, strict=True)
    ):
        for mine, theirs in zip(pack.answers, other.answers, strict=True):
            assert mine is theirs is None or torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))
        answer_N = torch.cat([pack.packed.answer_N, other.packed.answer_N])
        target_N = torch.cat([pack.packed.targets_N, other.packed.targets_N]).tolist()
        assert torch.equal(torch.bincount(answer_N), pack.answers.length_A)
        assert torch.equal(pack.answers.weight_A[answer_N], torch.cat([pack.weight_N, other.weight_N]))
        assert torch.equal(pack.answers.is_correct_A[answer_N], torch.cat([pack.is_correct_N, other.is_correct_N]))
        numbers = {
            (group_of[target], number) for target, number in zip(target_N, pack.answers.group_A[answer_N].tolist(), strict=True)
        }
        assert len(numbers) == len({group for group, _ in numbers}) == len({number for _, number in numbers})
        assert {number for _, number in numbers} == set(range(len(numbers)))
        seen += len(target_N)
    assert seen == sum(len(answer.completion.tokens) for group in groups for answer in judged(group))


def test_length_and_truncation_reach_the_advantage(tmp_path):
    """DAPO: one right answer, one wrong answer, and one wrong and truncated. s = 1, −1 and −2."""
    group = make_group(0, 2, [(3, "correct", 2), (4, "wrong", 2), (5, "wrong", 2)], itertools.count(1))
    cut = dataclasses.replace(group.answers[2].completion, finish_reason="length")
    answers = (*group.answers[:2], dataclasses.replace(group.answers[2], completion=cut))
    write_ledger(tmp_path / "ledger.parquet", [dataclasses.replace(group, answers=answers)], fates=["train"], meta={})
    rules = one_rank(token_budget=32, length_limit=100)
    (minibatch,) = read_minibatches(tmp_path / "ledger.parquet", STEP, build_algorithm("dapo"), rules, 0, 0, CPU)
    reward = np.array([1.0, -1.0, -2.0])
    expected = (reward - reward.mean()) / reward.std()
    (micro_batch,) = minibatch.micro_batches
    advantage = {n: micro_batch.advantage_N[micro_batch.packed.answer_N == n].unique().tolist() for n in range(3)}
    assert advantage == {n: pytest.approx([expected[n]], rel=1e-6) for n in range(3)}
