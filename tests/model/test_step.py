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
    entropies, gaps = [], []
    for group, _ in read_groups(path):
        for answer in group.answers:
            if answer.verdict.label != "unknown":
                tokens = torch.tensor(answer.completion.tokens).long()
                ids = torch.cat([torch.tensor(group.prompt.tokens).long(), tokens])
                logprobs = model(ids[None]).logits[0, len(group.prompt.tokens) - 1 : -1].log_softmax(-1)
                entropies += (-logprobs.exp() * logprobs).sum(-1).tolist()
                chosen = logprobs.gather(1, tokens[:, None])[:, 0]
                gaps += (chosen - torch.tensor(answer.completion.logprobs)).abs().tolist()
    assert stats["metrics"]["trained_tokens"] == len(entropies)
    assert stats["metrics"]["entropy"] == pytest.approx(np.mean(entropies), rel=1e-6)
    assert stats["metrics"]["mismatch_mean"] == pytest.approx(np.mean(gaps), rel=1e-5)
    assert stats["metrics"]["mismatch_max"] == pytest.approx(np.max(gaps), rel=1e-5)
