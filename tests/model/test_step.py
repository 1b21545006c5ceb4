"""A recorded step on every layout, against Eq. 10 written out for transformers' model in float64, one answer at a time."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gradient_worker import measure
from launcher import Ranks
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from nft_megatron.data.ledger import read_groups, write_ledger
from nft_megatron.records import Answer, Completion, Group, Prompt, Verdict

LAYOUTS = {"alone": (1, 1, 1), "tensor 2": (2, 1, 2), "pipeline 2": (1, 2, 2), "data 2": (1, 1, 2)}
EPSILON = 0.6
NUM_GROUPS, NUM_ANSWERS, NUM_UPDATES = 5, 6, 2


@pytest.fixture(scope="module")
def ledger(tmp_path_factory) -> Path:
    """Mixed groups with answers of unequal lengths, an unknown verdict, and log-probs of an older policy that is not ours."""
    rng = np.random.default_rng(0)

    def answer(group: int, index: int) -> Answer:
        tokens = rng.integers(1, 15, rng.integers(1, 12)).astype(np.int32)  # 0 pads: transformers gives it no gradient
        # log(1/15) is about what the random model gives: ratios on both sides of 1, clamped and not
        logprobs = np.minimum(-2.7 + rng.normal(0, 0.8, len(tokens)), -0.01).astype(np.float32)
        label = "unknown" if (group, index) == (2, 5) else "correct" if index <= group else "wrong"
        return Answer(Completion(group, index, tokens, logprobs, "stop", -5, 0.0), "", Verdict(label, "made up", "test"))

    def group(number: int) -> Group:
        tokens = rng.integers(1, 15, rng.integers(2, 9)).astype(np.int32)
        return Group(number, 1, Prompt(f"q{number}", "", "", tokens), tuple(answer(number, k) for k in range(NUM_ANSWERS)))

    path = tmp_path_factory.mktemp("ledger") / "step_000001.parquet"
    groups = [group(number) for number in range(NUM_GROUPS)]
    write_ledger(path, groups, fates=["train"] * len(groups), meta={})
    return path


def members(step: int, seed: int = 0) -> list[np.ndarray]:
    """Which groups meet in which mini-batch is part of a run's definition: the seeded permutation, split evenly."""
    return np.array_split(np.random.default_rng([seed, step]).permutation(NUM_GROUPS), NUM_UPDATES)


def reference(model_folder: Path, ledger: Path, groups: np.ndarray, algorithm: str) -> tuple[dict, float, float]:
    """Gradients and the two parts of the loss of one mini-batch, from the formulas of the paper."""
    model = Qwen2ForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    judged = [
        (group, answer)
        for group, _ in read_groups(ledger)
        if group.group_id in groups
        for answer in group.answers
        if answer.verdict.label != "unknown"
    ]
    denominator = sum(len(answer.completion.tokens) for _, answer in judged)
    parts = {True: torch.zeros((), dtype=torch.float64), False: torch.zeros((), dtype=torch.float64)}
    for group, answer in judged:
        prompt, tokens = torch.tensor(group.prompt.tokens).long(), torch.tensor(answer.completion.tokens).long()
        logits = model(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        ratio = (logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0] - torch.tensor(answer.completion.logprobs)).exp()
        rate, correct = group.num_correct / group.num_judged, answer.verdict.label == "correct"
        if correct:
            log_term = ratio.log()
        else:
            x = (1 - rate * ratio) / (1 - rate)
            log_term = ((x.clamp(min=EPSILON) - x).detach() + x).log()
        weight = 1 - rate if algorithm == "nft" else float(correct)
        parts[correct] = parts[correct] - weight * log_term.sum() / denominator
    (parts[True] + parts[False]).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients, float(parts[True].detach()), float(parts[False].detach())


@pytest.mark.parametrize("algorithm", ["nft", "rft"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_are_the_papers_on_every_layout(run_config, model_folder, ledger, tmp_path, layout, algorithm):
    tensor, pipeline, ranks = LAYOUTS[layout]
    options = {"name": "nft", "epsilon": EPSILON} if algorithm == "nft" else {"name": "rft"}
    config = run_config(
        algorithm=options, rollout={"questions_per_step": 4}, train={"updates_per_step": NUM_UPDATES, "micro_batch_tokens": 60},
        parallel={"tensor": tensor, "pipeline": pipeline},
    )  # fmt: skip
    outcome = Ranks(measure, (config, ledger, tmp_path / "out"), ranks, tmp_path).wait()
    assert outcome.returncode == 0, outcome.stderr
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    for i, groups in enumerate(members(step=1)):
        expected, positive, negative = reference(model_folder, ledger, groups, algorithm)
        assert stats["updates"][i]["positive"] == pytest.approx(positive, rel=1e-5)
        assert stats["updates"][i]["negative"] == pytest.approx(negative, rel=1e-5)
        measured = load_file(tmp_path / "out" / f"gradient_{i}.safetensors")
        assert measured.keys() == expected.keys() - {"lm_head.weight"}
        for name, gradient in measured.items():
            # q, k and v are one parameter of Megatron's; k's bias alone has nearly no gradient, as softmax ignores shifts
            together = [re.sub("[qkv]_proj", f"{part}_proj", name) for part in "qkv"]
            error = (gradient - expected[name]).abs().max() / max(expected[other].abs().max() for other in together)
            assert error < 1e-5, f"{name}: {error:.1e}"


def test_old_logprobs_make_every_ratio_one_before_the_first_update(run_config, model_folder, ledger, tmp_path):
    """With answers of the current weights (version step − 1), π_old is recomputed: R = 1, so the loss is 0 to the bit."""
    fresh = [
        replace(group, answers=tuple(replace(a, completion=replace(a.completion, weight_version=0)) for a in group.answers))
        for group, _ in read_groups(ledger)
    ]
    path = tmp_path / "fresh.parquet"
    write_ledger(path, fresh, fates=["train"] * len(fresh), meta={})
    outcome = Ranks(measure, (run_config(), path, tmp_path / "out"), 1, tmp_path).wait()
    assert outcome.returncode == 0, outcome.stderr
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert stats["updates"] == [{"positive": 0.0, "negative": 0.0}] * 2
    model = Qwen2ForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    entropies = []
    for group, _ in read_groups(path):
        for answer in group.answers:
            if answer.verdict.label != "unknown":
                ids = torch.tensor(np.concatenate([group.prompt.tokens, answer.completion.tokens])).long()
                logprobs = model(ids[None]).logits[0, len(group.prompt.tokens) - 1 : -1].log_softmax(-1)
                entropies += (-logprobs.exp() * logprobs).sum(-1).tolist()
    assert stats["metrics"]["entropy"] == pytest.approx(np.mean(entropies), rel=1e-6)
    assert stats["metrics"]["trained_tokens"] == len(entropies)
