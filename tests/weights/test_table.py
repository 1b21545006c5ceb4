import pytest
import torch
from torch import Tensor

from nft_megatron.weights.shape import ModelShape
from nft_megatron.weights.table import Entry, Layout, merge, split

HEADS, GROUPS, DIM, HIDDEN = 8, 4, 2, 3


def rows(count: int, offset: int) -> Tensor:
    """Row i is filled with offset + i, so that a row's number can be read off."""
    return (offset + torch.arange(count, dtype=torch.float32))[:, None].expand(count, HIDDEN).contiguous()


def qkv_entry() -> Entry:
    shapes = ((HEADS * DIM, HIDDEN), (GROUPS * DIM, HIDDEN), (GROUPS * DIM, HIDDEN))
    return Entry("qkv", ("q", "k", "v"), shapes, Layout.QKV, num_groups=GROUPS)


def test_qkv_is_interleaved_by_query_group():
    query, key, value = rows(16, 0), rows(8, 100), rows(8, 200)
    by_group = [x.view(GROUPS, -1, HIDDEN) for x in (query, key, value)]
    expected = torch.cat(by_group, dim=1).view(-1, HIDDEN)  # Megatron's [groups, q/groups + 2, dim] view of the parameter
    assert torch.equal(merge(qkv_entry(), [query, key, value], 1, 0, 0), expected)
    assert merge(qkv_entry(), [query, key, value], 4, 1, 0)[:, 0].tolist() == [4, 5, 6, 7, 102, 103, 202, 203]


def test_gate_stands_above_up_on_every_rank():
    entry = Entry("fc1", ("gate", "up"), ((6, HIDDEN), (6, HIDDEN)), Layout.SPLIT)
    assert merge(entry, [rows(6, 0), rows(6, 100)], 3, 2, 0)[:, 0].tolist() == [4, 5, 104, 105]


def test_a_row_parallel_weight_is_cut_along_its_columns():
    entry = Entry("fc2", ("down",), ((HIDDEN, 4),), Layout.SPLIT, axis=1)
    weight = torch.arange(12).view(HIDDEN, 4)
    assert torch.equal(merge(entry, [weight], 2, 1, 0), weight[:, 2:])


@pytest.mark.parametrize(("rank", "expected"), [(0, [0, 1]), (1, [2, 3]), (2, [4, 0]), (3, [0, 0])])
def test_rows_past_the_vocabulary_are_zero(rank: int, expected: list[int]):
    entry = Entry("embedding", ("embed",), ((5, HIDDEN),), Layout.VOCABULARY)
    assert merge(entry, [rows(5, 0)], 4, rank, 8)[:, 0].tolist() == expected


@pytest.mark.parametrize("tensor_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("entry", "padded_vocab"),
    [
        (qkv_entry(), 0),
        (Entry("bias", ("q", "k", "v"), ((16,), (8,), (8,)), Layout.QKV, num_groups=GROUPS), 0),
        (Entry("fc1", ("gate", "up"), ((8, 3), (8, 3)), Layout.SPLIT), 0),
        (Entry("fc2", ("down",), ((3, 8),), Layout.SPLIT, axis=1), 0),
        (Entry("norm", ("norm",), ((7,),), Layout.WHOLE), 0),
        (Entry("embedding", ("embed",), ((5, 3),), Layout.VOCABULARY), 8),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_split_gives_back_what_was_merged(entry: Entry, padded_vocab: int, tensor_size: int):
    generator = torch.Generator().manual_seed(1)
    sources = [torch.randn(shape, generator=generator) for shape in entry.shapes]
    shards = [merge(entry, sources, tensor_size, rank, padded_vocab) for rank in range(tensor_size)]
    assert {shard.shape for shard in shards} == {entry.local_shape(tensor_size, padded_vocab)}
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(split(entry, shards, padded_vocab), sources, strict=True))


def test_the_vocabulary_is_padded_up():
    shape = ModelShape(
        "", 1, 1, 1, 1, 1, 1, vocab_size=131, norm_epsilon=0, rope_theta=0, max_positions=1, tied_embeddings=True, qkv_bias=True
    )
    assert [shape.padded_vocab(multiple) for multiple in (1, 2, 128, 131)] == [131, 132, 256, 131]
