"""What a step computes before its first update. Losses and gradients are test_parity.py's."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from launcher import Ranks
from parity_worker import Run, measure
from recorded_step import LAYOUTS, NUM_UPDATES, write_config
from transformers import Qwen2ForCausalLM

from nft_megatron.data.ledger import read_groups, write_ledger
from nft_megatron.layout.batch import MicroBatch
from nft_megatron.model.step import Trainer


@pytest.mark.parametrize("name", ["alone", "tensor 2 × context 2"])
def test_old_logprobs_make_every_ratio_one_before_the_first_update(models, ledger, tmp_path, name):
    """With answers of the current weights (version step − 1), π_old is recomputed: R = 1, so the loss is 0 to the bit."""
    fresh = [
        replace(group, answers=tuple(replace(a, completion=replace(a.completion, weight_version=0)) for a in group.answers))
        for group, _ in read_groups(ledger)
    ]
    path = tmp_path / "fresh.parquet"
    write_ledger(path, fresh, fates=["train"] * len(fresh), meta={})
    config = write_config(tmp_path / "fresh", models["untied"], LAYOUTS[name])
    ended = Ranks(measure, ([Run(config, path, tmp_path / "out")],), LAYOUTS[name].num_processes, tmp_path).wait()
    assert ended.returncode == 0, ended.stderr
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert stats["updates"] == [{"positive": 0.0, "negative": 0.0}] * NUM_UPDATES
    model = Qwen2ForCausalLM.from_pretrained(models["untied"], dtype=torch.float64)
    entropies, deltas = [], []
    for group, _ in read_groups(path):
        for answer in group.answers:
            if answer.verdict.label != "unknown":
                tokens = torch.tensor(answer.completion.tokens).long()
                ids = torch.cat([torch.tensor(group.prompt.tokens).long(), tokens])
                logprobs = model(ids[None]).logits[0, len(group.prompt.tokens) - 1 : -1].log_softmax(-1)
                entropies += (-logprobs.exp() * logprobs).sum(-1).tolist()
                chosen = logprobs.gather(1, tokens[:, None])[:, 0]
                deltas += (chosen - torch.tensor(answer.completion.logprobs)).tolist()
    gaps = np.abs(deltas)
    assert stats["metrics"]["trained_tokens"] == len(entropies)
    assert stats["metrics"]["entropy"] == pytest.approx(np.mean(entropies), rel=1e-6)
    assert stats["metrics"]["mismatch_mean"] == pytest.approx(np.mean(gaps), rel=1e-5)
    assert stats["metrics"]["mismatch_max"] == pytest.approx(np.max(gaps), rel=1e-5)
    ratios = np.exp(np.array(deltas))
    assert stats["metrics"]["mismatch_kl"] == pytest.approx(np.mean(ratios - 1 - np.array(deltas)), rel=1e-4)
    assert stats["metrics"]["mismatch_ess"] == pytest.approx(ratios.sum() ** 2 / len(ratios) / (ratios**2).sum(), rel=1e-5)


def test_importance_weights_are_truncated_and_leave_older_answers_alone():
    """min(π / π_engine, cap) on each token of the current weights; π_old is the engine's own where the answer is older."""
    trainer = Trainer.__new__(Trainer)
    object.__setattr__(trainer, "importance_cap", 1.5)
    ones = torch.ones(3)
    batch = MicroBatch(
        packed=None, weight_N=0.5 * ones, is_correct_N=ones.bool(), correct_rate_N=ones,
        engine_logprob_N=torch.tensor([-1.0, -1.0, -1.0]), is_stale_N=torch.tensor([False, False, True]),
    )  # fmt: skip
    weighted = trainer._with_old_policy(batch, torch.tensor([-1.2, -0.1, -0.1]))
    assert weighted.weight_N.tolist() == pytest.approx([0.5 * np.exp(-0.2), 0.75, 0.5])
    assert weighted.old_logprob_N.tolist() == pytest.approx([-1.2, -0.1, -1.0])
