"""Which packs the pass for old log-probs goes through, and that losses, gradients and metrics do not depend on it.

Losses, gradients and new weights are compared with the papers' formulas over transformers' model in float64 (test_parity.py).
"""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from paper_step import assert_equal, paper, read_outcome
from parity_worker import Run, measure
from recorded_step import CURRENT, LAYOUTS, Layout, members, write_config
from slow import slow_beside
from transformers import Qwen2ForCausalLM

from nft_megatron.data.ledger import read_groups

KINDS_OF_LAYOUT = ("alone", "data 2", "data 4", "context 2", "tensor 2", "pipeline 2 interleaved", "pipeline 2, fixed lengths")
QUICK = ("alone", "data 2", "context 2", "pipeline 2 interleaved")


def run_all(world, layout: Layout, model: Path, ledger: Path, folder: Path, algorithms: list[str]) -> list[Run]:
    runs = [Run(write_config(folder / name, model, layout, name), ledger, folder / name / "out") for name in algorithms]
    world(layout.num_processes)(measure, runs)
    return runs


def stats_of(run: Run) -> dict:
    return json.loads((run.out / "stats.json").read_text())


def passes_of(packs: list[dict]) -> tuple[dict[int, set], dict[int, set], int]:
    """Of every data-parallel rank the packs with an answer of the current weights and those passed; and the number of packs."""
    num_current, passed, names = defaultdict(int), defaultdict(set), defaultdict(set)
    for pack in packs:  # as each tensor, context and pipeline rank sees it
        key = pack["rank"], pack["name"]
        num_current[key] += pack["num_current"]
        passed[key].add(pack["passed"])
        names[pack["rank"]].add(pack["name"])
    assert all(len(answers) == 1 for answers in passed.values()), "ranks that share a pack agree"
    required = {rank: {name for name in names[rank] if num_current[rank, name]} for rank in names}
    done = {rank: {name for name in names[rank] if passed[rank, name] == {True}} for rank in names}
    return required, done, len(names[0])


def measured_by_hand(model_folder: Path, ledger: Path, groups=None) -> dict[str, float]:
    """In float64: mean entropy of all judged answers, and mismatch of those of the current weights, perhaps of some groups."""
    model = Qwen2ForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    entropies, deltas = [], []
    for group, _ in read_groups(ledger):
        for answer in group.answers:
            if answer.verdict.label == "unknown":
                continue
            tokens = torch.tensor(answer.completion.tokens).long()
            ids = torch.cat([torch.tensor(group.prompt.tokens).long(), tokens])
            logprobs = model(ids[None]).logits[0, len(group.prompt.tokens) - 1 : -1].log_softmax(-1).detach()
            entropies += (-logprobs.exp() * logprobs).sum(-1).tolist()
            if answer.completion.weight_version == CURRENT and (groups is None or group.group_id in groups):
                deltas += (logprobs.gather(1, tokens[:, None])[:, 0] - torch.tensor(answer.completion.logprobs)).tolist()
    gaps, ratios = np.abs(deltas), np.exp(deltas)
    return {
        "trained_tokens": len(entropies),
        "entropy": np.mean(entropies),
        "mismatch_mean": np.mean(gaps) if deltas else 0.0,
        "mismatch_max": np.max(gaps) if deltas else 0.0,
        "mismatch_kl": np.mean(ratios - 1 - np.array(deltas)) if deltas else 0.0,
        "mismatch_ess": ratios.sum() ** 2 / len(ratios) / (ratios**2).sum() if deltas else 1.0,
    }


def assert_measured(metrics: dict, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=2e-5), name


@pytest.mark.parametrize("name", slow_beside(KINDS_OF_LAYOUT, QUICK))
def test_packs_of_older_answers_are_left_out_and_nothing_else_changes(world, models, mixed_ledger, tmp_path, name):
    layout = LAYOUTS[name]
    nft, infonca = run_all(world, layout, models["untied"], mixed_ledger, tmp_path, ["nft", "infonca"])
    required, passed, num_packs = passes_of(stats_of(nft)["packs"])
    assert all(required[rank] <= passed[rank] for rank in required)
    multiple = 2 if "interleaved" in name else 1
    num_passed = -(-max(map(len, required.values())) // multiple) * multiple
    assert {len(each) for each in passed.values()} == {num_passed}
    assert 0 < num_passed < num_packs
    if name == "alone":
        assert passed == required and num_packs - num_passed >= 3
    for run in (nft, infonca):
        assert_equal(read_outcome(run.out), paper(models["untied"], mixed_ledger, run.config.parent.name))
        assert_measured(stats_of(run)["metrics"], measured_by_hand(models["untied"], mixed_ledger))


@pytest.mark.parametrize("name", slow_beside(["alone", "tensor 2 × context 2"], ["tensor 2 × context 2"]))
def test_without_answers_of_the_current_weights_there_is_no_pass(world, models, ledger, tmp_path, name):
    """The updates measure the entropy, of losses of tokens and of whole answers; there is no mismatch to measure."""
    for run in run_all(world, LAYOUTS[name], models["tied"], ledger, tmp_path, ["nft", "infonca"]):
        _, passed, _ = passes_of(stats_of(run)["packs"])
        assert set(map(len, passed.values())) == {0}
        assert_measured(stats_of(run)["metrics"], measured_by_hand(models["tied"], ledger))


@pytest.mark.parametrize("name", slow_beside(["alone", "data 2", "context 2"], ["context 2"]))
def test_with_the_engines_log_probs_there_is_no_pass_and_the_first_update_measures_them(
    world, models, mixed_ledger, tmp_path, name
):
    layout = replace(LAYOUTS[name], train={"old_logprobs": "engine"})
    for run in run_all(world, layout, models["untied"], mixed_ledger, tmp_path, ["nft", "infonca"]):
        _, passed, _ = passes_of(stats_of(run)["packs"])
        assert set(map(len, passed.values())) == {0}
        assert_equal(read_outcome(run.out), paper(models["untied"], mixed_ledger, run.config.parent.name, recomputes=False))
        first = measured_by_hand(models["untied"], mixed_ledger, groups=members(step=1)[0])
        assert first["mismatch_mean"] > 0.1
        assert_measured(stats_of(run)["metrics"], first)
