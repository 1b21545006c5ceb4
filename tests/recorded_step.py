"""A recorded step of small models: what tests/model trains on, with which layouts and settings."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from literal import literal_loss
from transformers import Qwen2Config, Qwen2ForCausalLM

from nft_megatron.algorithms import build_algorithm
from nft_megatron.base.records import Answer, Completion, Group, Prompt, Verdict
from nft_megatron.data.ledger import read_groups, write_ledger

MAX_ANSWER = 32
NUM_GROUPS, NUM_ANSWERS, NUM_UPDATES = 5, 6, 2
VOCAB = 131  # not divisible by 2: padding under tensor parallelism
ADAM = {"learning_rate": 1e-3, "warmup_updates": 1, "epsilon": 1e-3, "weight_decay": 0.1, "clip_grad": 0.05}
"""An ε above the noise of float32, so that new weights are as comparable as gradients are; clipping is active."""


@dataclass(frozen=True)
class Objective:
    """An ``algorithm`` section and what its loss requires of the ``train`` section."""

    options: dict
    train: dict = field(default_factory=dict)


ALGORITHMS = {
    "nft": Objective({"name": "nft", "epsilon": 0.6}),
    "nft, ω sqrt, negatives 0.5": Objective(
        {"name": "nft", "epsilon": 0.3, "prompt_weight": "sqrt_odds", "negative_weight": 0.5}
    ),
    "nft, whole answers, as published": Objective(
        {"name": "nft", "ratio_type": "sequence", "beyond_cap": "zero", "rate_margin": 0.2}, {"denominator": "sequences"}
    ),
    "rft": Objective({"name": "rft"}),
    "grpo": Objective({"name": "grpo"}),
    "grpo, mean of each answer": Objective({"name": "grpo", "per_answer_mean": True}, {"denominator": "sequences"}),
    "dr_grpo": Objective({"name": "dr_grpo"}),
    "dapo": Objective({"name": "dapo", "overlong_buffer": 0.8}),
    "gspo": Objective({"name": "gspo", "clip_low": 0.2, "clip_high": 0.3}, {"denominator": "sequences"}),
    "cispo": Objective({"name": "cispo", "max_ratio": 1.5}),
    "infonca": Objective({"name": "infonca"}, {"micro_batch_tokens": 320}),
}


@dataclass(frozen=True)
class Layout:
    """``num_processes`` with these settings; the rest of them are data-parallel ranks."""

    num_processes: int
    parallel: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)
    optimizer: dict = field(default_factory=dict)
    kernels: dict = field(default_factory=dict)


OVERLAP = {"overlap_parameter_gather": True}
LAYOUTS = {
    "alone": Layout(1),
    "recompute MLPs": Layout(1, model={"recompute": "selective"}),
    "tensor 2": Layout(2, {"tensor": 2}),
    "tensor 2, no sequence parallel": Layout(2, {"tensor": 2, "sequence_parallel": False}),
    "pipeline 2, recompute layers": Layout(2, {"pipeline": 2}, {"recompute": "full"}),
    "pipeline 4": Layout(4, {"pipeline": 4}),
    "pipeline 2 interleaved": Layout(2, {"pipeline": 2, "virtual_pipeline": 2}),
    "pipeline 3, uneven": Layout(3, {"pipeline": 3, "first_stage_layers": 1, "last_stage_layers": 1}),
    "pipeline 2, uneven × data 2": Layout(4, {"pipeline": 2, "last_stage_layers": 1}),
    "pipeline 2, fixed lengths": Layout(2, {"pipeline": 2}, train={"pad_to_budget": True}),
    "data 2": Layout(2),
    "data 2, half of the optimizer on the host": Layout(2, optimizer={"cpu_offload": 0.5}),
    "data 4": Layout(4),
    "data 2, overlapped gathering": Layout(2, kernels=OVERLAP),
    "pipeline 2 interleaved × data 2, overlapped gathering": Layout(
        4, {"pipeline": 2, "virtual_pipeline": 2}, {"recompute": "full"}, kernels=OVERLAP
    ),
    "context 2": Layout(2, {"context": 2}),
    "context 2, recompute layers": Layout(2, {"context": 2}, {"recompute": "full"}),
    "context 4": Layout(4, {"context": 4}),
    "tensor 2 × context 2": Layout(4, {"tensor": 2, "context": 2}),
    "context 2 × data 2": Layout(4, {"context": 2}),
    "tensor 2 × pipeline 2 × data 2": Layout(8, {"tensor": 2, "pipeline": 2}),
    "tensor 2 × pipeline 2 × context 2": Layout(8, {"tensor": 2, "pipeline": 2, "context": 2}),
    "pipeline 2 interleaved × context 2 × data 2, fixed lengths, recompute MLPs": Layout(
        8,
        {"pipeline": 2, "virtual_pipeline": 2, "context": 2},
        {"recompute": "selective"},
        {"pad_to_budget": True},
    ),
}
REPRESENTATIVE = (
    "alone",
    "recompute MLPs",
    "tensor 2, no sequence parallel",
    "pipeline 2, recompute layers",
    "pipeline 2 interleaved",
    "pipeline 3, uneven",
    "pipeline 2, fixed lengths",
    "data 2",
    "data 2, half of the optimizer on the host",
    "data 2, overlapped gathering",
    "context 2 × data 2",
    "tensor 2 × context 2",
    "tensor 2 × pipeline 2 × context 2",
)
"""Every kind of parallelism and every setting of a layout: what `make test` looks at."""
KINDS = {"tied": True, "untied": False}


def write_models(folder: Path) -> dict[str, Path]:
    """Random 4-layer models whose norms and biases matter and whose attention is far from uniform."""
    for kind, tied in KINDS.items():
        torch.manual_seed(7)
        config = Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rope_theta=100.0,
            tie_word_embeddings=tied,
            pad_token_id=0,
        )
        model = Qwen2ForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.data += 0.2 * torch.randn_like(parameter)
            else:
                parameter.data *= 4
        model.save_pretrained(folder / kind)
    return {kind: folder / kind for kind in KINDS}


OLDER, CURRENT = -5, 0
"""Weight versions: step 1 begins with version 0."""


def all_older(group: int, index: int) -> int:
    """Every answer is from older weights, so that each recorded log-prob counts."""
    return OLDER


def one_in_four_current(group: int, index: int) -> int:
    """Some packs hold older answers only, others both kinds."""
    return OLDER if (group + index) % 4 else CURRENT


def write_step(path: Path, version_of: Callable[[int, int], int] = all_older) -> Path:
    """Mixed groups with answers of unequal lengths, an unknown verdict, and log-probs of a different policy.

    ``version_of``: the weights of a group's answer.
    """
    rng = np.random.default_rng(0)

    def answer(group: int, index: int) -> Answer:
        tokens = rng.integers(1, VOCAB, rng.integers(1, 25)).astype(np.int32)  # 0 pads: transformers gives it no gradient
        # log(1/131) is about what the random model gives, so ratios are on both sides of 1, clamped and not
        logprobs = np.minimum(-4.9 + rng.normal(0, 0.8, len(tokens)), -0.01).astype(np.float32)
        label = "unknown" if (group, index) == (2, 5) else "correct" if index <= group else "wrong"
        reason = "length" if (group + index) % 7 == 0 else "stop"
        completion = Completion(group, index, tokens, logprobs, reason, version_of(group, index), 0.0)
        return Answer(completion, "", Verdict(label, "made up", "test"))

    def group(number: int) -> Group:
        tokens = rng.integers(1, VOCAB, rng.integers(2, 15)).astype(np.int32)
        return Group(number, 1, Prompt(f"q{number}", "", "", tokens), tuple(answer(number, k) for k in range(NUM_ANSWERS)))

    groups = [group(number) for number in range(NUM_GROUPS)]
    write_ledger(path, groups, fates=["train"] * len(groups), meta={})
    return path


def members(step: int, seed: int = 0) -> list[np.ndarray]:
    """Which groups meet in which mini-batch is part of a run's definition: the seeded permutation, split evenly."""
    return np.array_split(np.random.default_rng([seed, step]).permutation(NUM_GROUPS), NUM_UPDATES)


def paper_loss(
    logprobs_of, ledger: Path, groups: np.ndarray, algorithm: str, recomputes: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """What right and wrong answers each add to the papers' loss over one mini-batch, before the step's first update.

    ``logprobs_of(prompt, answer)`` gives log π_θ of the answer's tokens. π_old is what is recorded, but π_θ itself for answers
    of the current weights if it ``recomputes``.
    """
    settings = ALGORITHMS[algorithm]
    options = build_algorithm(**settings.options).model_dump()
    parts = {True: torch.zeros((), dtype=torch.float64), False: torch.zeros((), dtype=torch.float64)}
    num = {"tokens": 0, "sequences": 0}
    for group, _ in read_groups(ledger):
        if group.group_id not in groups:
            continue
        judged = [answer for answer in group.answers if answer.verdict.label != "unknown"]
        prompt = torch.tensor(group.prompt.tokens).long()
        new = [logprobs_of(prompt, torch.tensor(answer.completion.tokens).long()) for answer in judged]
        is_own = [recomputes and answer.completion.weight_version == CURRENT for answer in judged]
        recorded = [torch.tensor(answer.completion.logprobs).double() for answer in judged]
        losses = literal_loss(
            options["name"],
            new,
            [n.detach() if own else old for n, old, own in zip(new, recorded, is_own, strict=True)],
            [answer.verdict.label == "correct" for answer in judged],
            [answer.completion.finish_reason == "length" for answer in judged],
            MAX_ANSWER,
            options,
        )
        for answer, loss in zip(judged, losses, strict=True):
            parts[answer.verdict.label == "correct"] += loss
        num["tokens"] += sum(len(answer.completion.tokens) for answer in judged)
        num["sequences"] += len(judged)
    denominator = num[settings.train.get("denominator", "tokens")]
    return parts[True] / denominator, parts[False] / denominator


def write_config(folder: Path, model: Path, layout: Layout, algorithm: str = "nft", dtype: str = "float32") -> Path:
    settings = ALGORITHMS[algorithm]
    tree = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(model), "dtype": dtype, **layout.model},
        "data": {"train": "not read", "max_prompt_tokens": 16},
        "rollout": {"questions_per_step": 4, "group_size": NUM_ANSWERS, "max_answer_tokens": MAX_ANSWER},
        "algorithm": settings.options,
        "optimizer": {**ADAM, **layout.optimizer},
        "train": {
            "num_steps": 1,
            "updates_per_step": NUM_UPDATES,
            "minibatch_of": "questions",
            "micro_batch_tokens": 64,
            **layout.train,
            **settings.train,
        },
        "parallel": layout.parallel,
        "kernels": layout.kernels,
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"
