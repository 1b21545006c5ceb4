"""What a step computes before its first update. Losses and gradients are test_parity.py's."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from literal import literal_loss
from parity_worker import Run, instruments, measure, mismatches
from recorded_step import ALGORITHMS, LAYOUTS, MAX_ANSWER, NUM_UPDATES, members, write_config
from slow import slow_beside
from transformers import Qwen2ForCausalLM

from nft_megatron.algorithms import build_algorithm
from nft_megatron.batching.batch import MicroBatch
from nft_megatron.data.ledger import read_groups, write_ledger
from nft_megatron.model.step import Trainer


@pytest.mark.parametrize("name", ["alone", "tensor 2 × context 2"])
def test_old_logprobs_make_every_ratio_one_before_the_first_update(world, models, ledger, tmp_path, name):
    """With answers of the current weights (version step − 1), π_old is recomputed: R = 1, so the loss is exactly 0."""
    fresh = [
        replace(group, answers=tuple(replace(a, completion=replace(a.completion, weight_version=0)) for a in group.answers))
        for group, _ in read_groups(ledger)
    ]
    path = tmp_path / "fresh.parquet"
    write_ledger(path, fresh, fates=["train"] * len(fresh), meta={})
    config = write_config(tmp_path / "fresh", models["untied"], LAYOUTS[name])
    world(LAYOUTS[name].num_processes)(measure, [Run(config, path, tmp_path / "out")])
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
        packed=None,
        weight_N=0.5 * ones,
        is_correct_N=ones.bool(),
        correct_rate_N=ones,
        engine_logprob_N=torch.tensor([-1.0, -1.0, -1.0]),
        is_stale_N=torch.tensor([False, False, True]),
    )
    weighted = trainer._with_old_policy(batch, torch.tensor([-1.2, -0.1, -0.1]))
    assert weighted.weight_N.tolist() == pytest.approx([0.5 * np.exp(-0.2), 0.75, 0.5])
    assert weighted.old_logprob_N.tolist() == pytest.approx([-1.2, -0.1, -1.0])


def test_the_probe_counts_every_answer_whatever_the_algorithm(world, models, ledger, tmp_path):
    """One answer per question, all marked right, as the probe writes them: under GRPO they have no advantage."""
    alone = []
    for group, _ in read_groups(ledger):
        answer = next(answer for answer in group.answers if answer.verdict.label == "correct")
        answer = replace(answer, completion=replace(answer.completion, weight_version=0))
        alone.append(replace(group, answers=(answer,)))
    write_ledger(tmp_path / "gate.parquet", alone, fates=["train"] * len(alone), meta={})
    names = ["nft", "grpo", "infonca"]
    configs = [write_config(tmp_path / name, models["tied"], LAYOUTS["alone"], name) for name in names]
    runs = [Run(config, tmp_path / "gate.parquet", config.parent / "out") for config in configs]
    world(1)(mismatches, runs)
    measured = [json.loads((run.out / "stats.json").read_text()) for run in runs]
    num_tokens = sum(len(group.answers[0].completion.tokens) for group in alone)
    assert [each["trained_tokens"] for each in measured] == [num_tokens] * 3
    assert all(each["mismatch_mean"] == pytest.approx(measured[0]["mismatch_mean"], rel=1e-6) for each in measured)
    assert measured[0]["mismatch_mean"] > 0.1  # the recorded log-probs are another policy's


def instruments_reference(model_folder, ledger, name) -> dict:
    """By the definitions, in float64: sums over the tokens of the first mini-batch, and the angle between two gradients."""
    model = Qwen2ForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    options = build_algorithm(**ALGORITHMS[name].options).model_dump()
    rows, slopes = [], {True: 0.0, False: 0.0}
    for group, _ in read_groups(ledger):
        judged = [a for a in group.answers if group.group_id in members(step=1)[0] and a.verdict.label != "unknown"]
        if not judged:
            continue
        new, old = [], [torch.tensor(a.completion.logprobs).double() for a in judged]
        for answer in judged:
            tokens = torch.tensor(answer.completion.tokens).long()
            ids = torch.cat([torch.tensor(group.prompt.tokens).long(), tokens])
            logits = model(ids[None]).logits[0, len(group.prompt.tokens) - 1 : -1]
            new.append(logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
        correct, cut = [a.verdict.label == "correct" for a in judged], [a.completion.finish_reason == "length" for a in judged]
        losses = literal_loss(options["name"], new, old, correct, cut, MAX_ANSWER, options)
        gradients = torch.autograd.grad(sum(losses), new, retain_graph=True)
        rate = sum(correct) / len(correct)
        for k in range(len(judged)):
            slopes[correct[k]] = slopes[correct[k]] + (gradients[k] * new[k]).sum()
            x = (1 - rate * (new[k] - old[k]).detach().exp()) / (1 - rate)
            rows += [(rate, correct[k], *each) for each in zip(x.tolist(), gradients[k].abs().tolist(), strict=True)]
    total = sum(gradient for *_, gradient in rows)
    expected = {}
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = [row for row in rows if low <= row[0] < low + 0.2 - 1e-9]
        wrong = [x for _, is_correct, x, _ in inside if not is_correct]
        if wrong:
            expected[f"negative_ratio/{low:.1f}-{low + 0.2:.1f}"] = np.mean(wrong)
            if options["name"] == "nft":
                expected[f"clamp_rate/{low:.1f}-{low + 0.2:.1f}"] = np.mean([x < options["epsilon"] for x in wrong])
        if inside:
            expected[f"gradient_share/{low:.1f}-{low + 0.2:.1f}"] = sum(gradient for *_, gradient in inside) / total
    parts = [torch.autograd.grad(slopes[side], list(model.parameters()), retain_graph=True) for side in (True, False)]
    right, wrong = (torch.cat([gradient.flatten() for gradient in part]) for part in parts)
    return expected | {"gradient_cosine": float(right @ wrong / right.norm() / wrong.norm())}


@pytest.mark.parametrize(
    "layout",
    slow_beside(["alone", "context 2", "tensor 2 × context 2", "pipeline 2 interleaved", "data 2"], ["context 2"]),
)
def test_instruments_are_what_their_definitions_say(world, models, ledger, tmp_path, layout):
    """By r̂: clamped tokens, mean implicit negative ratio, share of the gradient; and the cosine of its two parts."""
    names = ["nft", "dapo", "infonca"]
    runs = [Run(write_config(tmp_path / n, models["tied"], LAYOUTS[layout], n), ledger, tmp_path / n / "out") for n in names]
    world(LAYOUTS[layout].num_processes)(instruments, runs)
    for name, run in zip(names, runs, strict=True):
        measured = json.loads((run.out / "stats.json").read_text())
        for metric, value in instruments_reference(models["tied"], ledger, name).items():
            assert measured[metric] == pytest.approx(value, rel=2e-5, abs=1e-7), (name, metric)
