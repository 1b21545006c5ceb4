import importlib
import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nft_megatron.model.attention as attention_module
from nft_megatron.model.attention import PackedAttention, rotary_cos_sin
from nft_megatron.model.packed_sequences import pack_sequences

CPU = torch.device("cpu")
HEADS, GROUPS, DIM = 4, 2, 8
FREQUENCIES = 100.0 ** (-torch.arange(0, DIM, 2) / DIM)


def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal grouped-query attention of one sequence with rotary positions, written out in complex numbers."""
    position = torch.arange(len(query), dtype=torch.float64)
    angle = position[:, None] * FREQUENCIES.double()

    def rotate(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., : DIM // 2], x[..., DIM // 2 :]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat((turned.real, turned.imag), dim=-1)

    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (rotate(key), value))
    scores = torch.einsum("qhd,khd->hqk", rotate(query), key) / DIM**0.5
    scores = scores.masked_fill(torch.ones(len(query), len(query)).triu(1).bool(), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), seed=st.integers(0, 1000))
def test_each_sequence_as_if_alone(lengths: list[int], seed: int):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    shapes = [(total, HEADS, DIM), (total, GROUPS, DIM), (total, GROUPS, DIM)]
    qkv = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    weight = torch.randn(total, HEADS * DIM, dtype=torch.float64, generator=generator)

    expected = torch.cat([reference(*parts) for parts in zip(*(x.split(lengths) for x in qkv), strict=True)])
    expected_grads = torch.autograd.grad((expected * weight).sum(), qkv)

    packed = pack_sequences(lengths, CPU)
    positions = torch.cat([torch.arange(length) for length in lengths])
    packed.cos_T1D, packed.sin_T1D = rotary_cos_sin(positions, FREQUENCIES, torch.float64)
    attention = PackedAttention(SimpleNamespace(kv_channels=DIM), SimpleNamespace(cp=None))
    output = attention(*qkv, None, packed_seq_params=packed)
    grads = torch.autograd.grad((output[:, 0] * weight).sum(), qkv)

    assert output.shape == (total, 1, HEADS * DIM)
    torch.testing.assert_close(output[:, 0], expected, rtol=0, atol=2e-5)  # angles are float32
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max() + 1))


@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=40))
@settings(deadline=None)
def test_padded_ranges_hold_every_token_once_and_little_padding(lengths: list[int]):
    packed = pack_sequences(lengths, CPU)
    total = sum(lengths)
    assert packed.cu_seqlens_q.tolist() == [0, *itertools.accumulate(lengths)]
    for ranges in (packed.query_ranges, packed.key_ranges):
        assert torch.equal(ranges.tokens_R[ranges.positions_T], torch.arange(total))
        assert len(ranges.tokens_R) == sum(batch.num_chunks * batch.num_keys for batch in packed.batches)
        assert len(ranges.tokens_R) <= 1.125 * total
    assert sum(batch.num_chunks for batch in packed.batches) == len(lengths)


@settings(max_examples=25, deadline=None)
@given(chunks=st.lists(st.integers(1, 12), min_size=1, max_size=6), size=st.sampled_from([2, 4]), seed=st.integers(0, 1000))
def test_context_ranks_together_attend_as_one(chunks: list[int], size: int, seed: int):
    """The collective is left to test_parity.py: here each rank's keys are gathered by hand."""
    lengths = [2 * size * chunk for chunk in chunks]
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(sum(lengths), heads, DIM, dtype=torch.float64, generator=generator) for heads in (HEADS, GROUPS, GROUPS)
    )
    expected = torch.cat([reference(*parts) for parts in zip(*(x.split(lengths) for x in (query, key, value)), strict=True)])
    positions = torch.cat([torch.arange(length) for length in lengths])

    def chunk_of(rank: int) -> Tensor:
        """Chunks ``rank`` and ``2 size − 1 − rank`` of each sequence, written out."""
        held, start = [], 0
        for chunk in chunks:
            for place in (rank, 2 * size - 1 - rank):
                held += range(start + place * chunk, start + (place + 1) * chunk)
            start += 2 * size * chunk
        return torch.tensor(held)

    in_turn = torch.cat([chunk_of(rank) for rank in range(size)])
    for rank in range(size):
        own = chunk_of(rank)
        packed = pack_sequences(lengths, CPU, rank, size)
        packed.cos_T1D, packed.sin_T1D = rotary_cos_sin(positions[own], FREQUENCIES, torch.float64)
        whole = SimpleNamespace(apply=lambda x, index, group: gathered(x).index_select(0, index))

        def gathered(own_keys_and_values: Tensor) -> Tensor:
            cos_T1D, sin_T1D = rotary_cos_sin(positions[in_turn], FREQUENCIES, torch.float64)
            turned = attention_module._Rotary.apply(key[in_turn], cos_T1D, sin_T1D)
            return torch.cat((turned, value[in_turn]), dim=-1)

        attention = PackedAttention(SimpleNamespace(kv_channels=DIM), SimpleNamespace(cp=None))
        with mock.patch.object(attention_module, "_ContextKeys", whole):
            output = attention(query[own], key[own], value[own], None, packed_seq_params=packed)
        torch.testing.assert_close(output[:, 0], expected[own], rtol=0, atol=2e-5)


def test_the_engine_needs_the_bounds_of_the_sequences_alone():
    packed = pack_sequences([8, 16], CPU, 1, 2, attention="engine")
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 8, 24]
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 16
    own = {"key_index_K", "query_ranges", "key_ranges", "chunk_starts_q", "chunk_starts_k"}
    assert all(getattr(packed, name) is None for name in own) and packed.batches == ()


@pytest.mark.parametrize("has_argument", [True, False], ids=["torch 2.12 and newer", "torch 2.11"])
def test_the_variable_length_kernel_gets_what_its_version_knows(monkeypatch, has_argument):
    """A stand-in with the signature of that version, which attends as the padded kind does."""
    lengths, generator = [5, 9, 1], torch.Generator().manual_seed(0)
    qkv = [torch.randn(15, heads, DIM, generator=generator) for heads in (HEADS, GROUPS, GROUPS)]
    positions = torch.cat([torch.arange(length) for length in lengths])
    seen = []

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        seen.append((cu_seq_q.tolist(), cu_seq_k.tolist(), max_q, max_k, window_size))
        parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        heads_first = ([x.transpose(0, 1) for x in part] for part in parts)
        attend = torch.nn.functional.scaled_dot_product_attention
        outputs = [attend(*part, is_causal=True, scale=scale, enable_gqa=True) for part in heads_first]
        return torch.cat([output.transpose(0, 1) for output in outputs])

    def newer_kernel(*tensors, enable_gqa=False, **options):
        assert enable_gqa, "refused: the keys have fewer heads"
        return kernel(*tensors, **options)

    varlen = importlib.import_module("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", newer_kernel if has_argument else kernel)
    attention_module._grouped_heads.cache_clear()
    outputs = []
    for kind in ("padded", "varlen"):
        packed = pack_sequences(lengths, CPU, attention=kind)
        packed.cos_T1D, packed.sin_T1D = rotary_cos_sin(positions, FREQUENCIES, torch.float32)
        attention = PackedAttention(SimpleNamespace(kv_channels=DIM), SimpleNamespace(cp=None))
        outputs.append(attention(*qkv, None, packed_seq_params=packed))
    attention_module._grouped_heads.cache_clear()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-6)
    assert seen == [([0, 5, 14, 15], [0, 5, 14, 15], 9, 9, (-1, 0))]


@pytest.mark.gpu
def test_the_variable_length_kernel_agrees_on_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: run `pytest -m gpu` on a machine with one")
    lengths, device = [5, 130, 64, 1], torch.device("cuda")
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(200, heads, 64, generator=generator).bfloat16() for heads in (4, 2, 2)]
    frequencies = 1e4 ** (-torch.arange(0, 64, 2) / 64)
    outputs = []
    for place in (CPU, device):
        packed = pack_sequences(lengths, place, attention="varlen" if place is device else "padded")
        positions = torch.cat([torch.arange(length) for length in lengths]).to(place)
        packed.cos_T1D, packed.sin_T1D = rotary_cos_sin(positions, frequencies.to(place), torch.bfloat16)
        attention = PackedAttention(SimpleNamespace(kv_channels=64), SimpleNamespace(cp=None))
        outputs.append(attention(*(x.to(place) for x in qkv), None, packed_seq_params=packed).cpu().float())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=3e-2)
