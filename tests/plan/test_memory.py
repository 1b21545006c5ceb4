"""Components of a rank's memory that other tests do not hold against the real model."""

from dataclasses import replace

import plan_worker
import pytest

from nft_megatron.plan.memory import StageMemory, lm_head_bytes, padded_vocab, stage_memory, stage_numel
from nft_megatron.plan.models import PUBLIC_MODELS

SHAPE = PUBLIC_MODELS["Qwen2.5-7B"]


def memory(layout, stage: int = 0, shape=SHAPE, **settings) -> StageMemory:
    return stage_memory(shape, layout, stage, **{"dtype": "bfloat16", "on_gpu": True, "num_micro_batches": 32, **settings})


def test_one_gpu_holds_eighteen_bytes_a_parameter(make_layout):
    """bfloat16 weights, float32 gradients, float32 master weights and two moments."""
    numel = 7_615_616_512  # as published; 152064 rows need no padding
    stage = memory(make_layout())
    assert (stage.parameters, stage.gradients, stage.optimizer) == (2 * numel, 4 * numel, 12 * numel)


def test_float32_training_has_no_master_weights(make_layout):
    stage = memory(make_layout(), dtype="float32")
    assert stage.parameters == stage.gradients == stage.optimizer / 2


def test_replicas_share_the_optimizer_only(make_layout):
    alone, shared = memory(make_layout()), memory(make_layout(data=4, context=2))
    assert shared.optimizer == alone.optimizer / 8
    assert (shared.parameters, shared.gradients) == (alone.parameters, alone.gradients)


def test_an_offloaded_optimizer_is_away_while_activations_live_and_back_for_the_update(make_layout):
    here = memory(make_layout(recompute="full", micro_batch_tokens=512))
    away = memory(make_layout(recompute="full", micro_batch_tokens=512), cpu_offload=1.0)
    resident = away.parameters + away.gradients + away.runtime
    assert away.offloaded == here.optimizer
    assert away.peak == resident + max(away.activations + max(away.working, away.lm_head), away.optimizer)
    assert away.peak == resident + away.optimizer < here.peak  # the update is the peak here


def test_activations_grow_with_tokens_and_shrink_with_every_rank_that_shares_them(make_layout):
    one = memory(make_layout(micro_batch_tokens=8192)).activations
    assert memory(make_layout(micro_batch_tokens=16384)).activations == 2 * one
    assert memory(make_layout(micro_batch_tokens=8192, context=4)).activations == one / 4
    assert memory(make_layout(micro_batch_tokens=8192, tensor=4)).activations == pytest.approx(one / 4)
    assert memory(make_layout(micro_batch_tokens=8192, tensor=4, sequence_parallel=False)).activations > one / 4


def test_the_first_stage_keeps_the_most_and_the_last_has_the_lm_head(make_layout):
    stages = [memory(make_layout(pipeline=4), stage) for stage in range(4)]
    assert [stage.activations for stage in stages] == sorted((stage.activations for stage in stages), reverse=True)
    assert [stage.lm_head > 0 for stage in stages] == [False, False, False, True]


def test_a_tied_head_is_a_second_copy_only_on_another_stage(make_layout):
    tied = PUBLIC_MODELS["Qwen2.5-0.5B"]
    embedding = 151936 * 896
    whole = stage_numel(tied, make_layout(), 0, on_gpu=False)
    halves = [stage_numel(tied, make_layout(pipeline=2), stage, on_gpu=False) for stage in range(2)]
    assert whole == 494_032_768
    assert sum(halves) == whole + embedding


def test_vocabulary_padding_is_a_multiple_of_128_rows_a_gpu():
    shape = replace(SHAPE, vocab_size=151_650)
    assert [padded_vocab(shape, t, on_gpu=True) for t in (1, 2, 8)] == [151_680, 151_808, 152_576]
    assert padded_vocab(shape, 4, on_gpu=False) == 151_652


def test_the_lm_head_holds_a_chunk_of_logits_and_never_all_of_them(make_layout):
    tokens = 65536
    held = lm_head_bytes(SHAPE, make_layout(micro_batch_tokens=tokens), "bfloat16", on_gpu=True)
    hidden = 2 * SHAPE.hidden_size * tokens
    assert held < 4 * hidden + 2 * SHAPE.vocab_size * SHAPE.hidden_size + 1
    assert held < tokens * SHAPE.vocab_size * 2 / 5


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_fused_layers_keep_the_published_number_of_bytes(make_layout, recompute: str):
    """Korthikanti et al. (arXiv 2205.05198), section 4.1: 2h for the input of q, k and v, 2h each for q, k, v and the
    projection's input, 4h for the norms, and for an MLP its input and what its activation function reads and writes. We have
    no dropout, SwiGLU reads 2f and writes f, and fused attention keeps a log-sum-exp a head instead of all scores.
    """
    shape = replace(plan_worker.small_shape(1), num_query_groups=8)  # as many keys as queries
    h, f, q, heads = 64, 176, 128, 8
    attention, norms, mlp = 2 * h + 4 * 2 * q, 4 * h, 2 * h + 2 * 3 * f
    statistics = {"none": 4 * heads + 4 + 4, "selective": 4 * heads + 4, "full": 0}  # float32; 1/rms of a norm
    kept = {"none": attention + norms + mlp, "selective": attention + norms, "full": 2 * h}
    stage = memory(make_layout(recompute=recompute, micro_batch_tokens=1000), shape=shape)
    final_norm = 2 * h + 4
    assert stage.activations == 1000 * (kept[recompute] + statistics[recompute] + final_norm)
