"""What all ranks together read from a ledger is what the ledger's groups say, under any layout."""

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
from nft_megatron.data.ledger import write_ledger
from nft_megatron.errors import UserError
from nft_megatron.layout.batch import read_minibatches
from nft_megatron.layout.minibatches import Layout
from nft_megatron.records import Answer, Completion, Group, Prompt, Verdict

STEP, SEED = 3, 11
CPU = torch.device("cpu")
ALGORITHMS = {
    "nft": build_algorithm(name="nft", epsilon=1.0, prompt_weight="one_minus_rate", negative_weight=1.0),
    "rft": build_algorithm(name="rft"),
}
OMEGA = {"nft": lambda rate: 1 - rate, "rft": lambda rate: 1.0}  # of a question's share of right answers


def make_group(number, prompt_length, answers, fresh) -> Group:
    """All tokens of all groups are different, so none can be mistaken for another; so are the engine's log-probs."""

    def answer(index, length, label, version) -> Answer:
        tokens = np.array([next(fresh) for _ in range(length)], dtype=np.int32)
        completion = Completion(number, index, tokens, -(tokens / 1024).astype(np.float32), "stop", version, 0.0)
        return Answer(completion, "", Verdict(label, "", ""))

    prompt = Prompt(f"q{number}", "", "", np.array([next(fresh) for _ in range(prompt_length)], dtype=np.int32))
    return Group(number, STEP, prompt, tuple(answer(index, *each) for index, each in enumerate(answers)))


labels = st.sampled_from(["correct", "wrong", "unknown"])
answers = st.lists(st.tuples(st.integers(0, 12), labels, st.integers(STEP - 3, STEP - 1)), min_size=1, max_size=5)


@st.composite
def cases(draw):
    context, tensor = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    layout = Layout(
        num_updates=draw(st.integers(1, 3)),
        num_ranks=draw(st.integers(1, 3)),
        token_budget=16 * draw(st.integers(8, 12)),  # the 5 answers of a group with 24 tokens each are at most 120
        hidden_size=8,
        denominator=draw(st.sampled_from(["tokens", "sequences", 100.0])),
        seed=SEED,
        tensor_size=tensor,
        context_size=context,
        count_multiple=draw(st.sampled_from([1, 2, 3])),
        pad_to_budget=draw(st.booleans()),
        keep_groups=draw(st.booleans()),
    )
    fresh = itertools.count(1)
    drawn = draw(st.lists(st.tuples(st.integers(1, 6), answers), min_size=1, max_size=6))
    groups = [make_group(number, *each, fresh) for number, each in enumerate(drawn)]
    fates = draw(st.lists(st.sampled_from(["train", "train", "surplus"]), min_size=len(groups), max_size=len(groups)))
    return groups, fates, layout, draw(st.sampled_from(["nft", "rft"]))


def judged(group):
    """The answers that count: judged, and not empty."""
    return [a for a in group.answers if a.verdict.label != "unknown" and len(a.completion.tokens)]


def expected_tokens(groups, denominator, name):
    """What every token of a mini-batch's answers must be trained with, from the records alone."""
    kept = [answer for group in groups for answer in judged(group)]
    tokens = sum(len(answer.completion.tokens) for answer in kept)
    divisor = {"tokens": tokens, "sequences": len(kept)}.get(denominator, denominator)
    for group in groups:
        verdicts = [answer.verdict.label for answer in group.answers if answer.verdict.label != "unknown"]
        for answer in judged(group):
            is_correct, rate = answer.verdict.label == "correct", verdicts.count("correct") / len(verdicts)
            sequence = [*group.prompt.tokens.tolist(), *answer.completion.tokens.tolist()]
            for t in range(len(group.prompt.tokens), len(sequence)) if is_correct or name == "nft" else ():
                yield {
                    "target": sequence[t],
                    "input": sequence[t - 1],
                    "position": t - 1,
                    "weight": float(np.float32(OMEGA[name](rate) / divisor)),
                    "is_correct": is_correct,
                    "correct_rate": float(np.float32(rate)),
                    "engine_logprob": -sequence[t] / 1024,
                    "is_stale": answer.completion.weight_version < STEP - 1,  # weights before STEP are of version STEP − 1
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
        "is_stale": micro_batch.is_stale_N,
    }
    for row in zip(*(column.tolist() for column in columns.values()), strict=True):
        yield dict(zip(columns, row, strict=True))


def count(tokens) -> Counter:
    return Counter(tuple(token.items()) for token in tokens)


@given(cases())
@settings(deadline=None, max_examples=60)
def test_all_ranks_together_read_every_token_once_with_what_belongs_to_it(case):
    groups, fates, layout, name = case
    trained = [group for group, fate in zip(groups, fates, strict=True) if fate == "train" and judged(group)]
    assume(trained)
    algorithm = ALGORITHMS[name]
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / "ledger.parquet"
        write_ledger(ledger, groups, fates=fates, meta={})
        ranks = {
            (data, context): read_minibatches(ledger, STEP, algorithm, layout, data, context, CPU)
            for data in range(layout.num_ranks)
            for context in range(layout.context_size)
        }

    order = np.random.default_rng([SEED, STEP]).permutation([group.group_id for group in trained])
    parts = np.array_split(order, min(layout.num_updates, len(trained)))
    assert {len(minibatches) for minibatches in ranks.values()} == {len(parts)}
    for number, part in enumerate(parts):
        expected = list(expected_tokens([group for group in trained if group.group_id in part], layout.denominator, name))
        minibatches = {rank: each[number] for rank, each in ranks.items()}
        micro_batches = [micro_batch for each in minibatches.values() for micro_batch in each.micro_batches]
        assert count(token for each in micro_batches for token in read_tokens_of(each)) == count(expected)
        assert {minibatch.num_tokens for minibatch in minibatches.values()} == {len(expected)}
        (num_micro_batches,) = {len(minibatch.micro_batches) for minibatch in minibatches.values()}
        assert num_micro_batches % layout.count_multiple == 0
        group_of = {token: g.group_id for g in trained for a in g.answers for token in a.completion.tokens.tolist()}
        homes = Counter()
        for data, k in itertools.product(range(layout.num_ranks), range(num_micro_batches)):
            packs = [minibatches[data, context].micro_batches[k].packed for context in range(layout.context_size)]
            (cu_seqlens,) = {tuple(packed.cu_seqlens.tolist()) for packed in packs}
            assert cu_seqlens[-1] == sum(len(packed.input_ids_T) for packed in packs) <= layout.token_budget
            assert cu_seqlens[-1] == layout.token_budget or not layout.pad_to_budget
            homes.update({group_of[token] for packed in packs for token in packed.targets_N.tolist()})
        assert not layout.keep_groups or set(homes.values()) <= {1}


def test_a_group_too_long_for_a_micro_batch_is_named(tmp_path):
    answers = [(40, "correct", 2), (40, "wrong", 2)]
    write_ledger(tmp_path / "ledger.parquet", [make_group(0, 10, answers, itertools.count(1))], fates=["train"], meta={})
    layout = Layout(
        num_updates=1, num_ranks=1, token_budget=96, hidden_size=8, denominator="tokens", seed=0, tensor_size=1,
        context_size=1, count_multiple=1, pad_to_budget=False, keep_groups=True,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"train\.micro_batch_tokens = 96: .* have 100 tokens; raise it to at least 100"):
        read_minibatches(tmp_path / "ledger.parquet", STEP, ALGORITHMS["nft"], layout, 0, 0, CPU)
