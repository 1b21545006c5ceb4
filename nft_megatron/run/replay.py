"""Replay of a recorded step from its ledger and the weights before it, under any layout or algorithm.

    nft-megatron replay RUN --step N [section.key=value …]

The updates are redone in memory; the run folder is not written. Under the run's own layout they reproduce RUN/metrics.jsonl
bit for bit; under another they differ by rounding; under another algorithm they are what that algorithm would have done with
the same answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.errors import UserError
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.config.load import config_from, load_config
from nft_megatron.config.schema import Config
from nft_megatron.data.ledger import check_step, read_verifiers
from nft_megatron.model.control import on_main, together
from nft_megatron.observe.metrics import MetricsRow, read_metrics
from nft_megatron.run.build import build_trainer
from nft_megatron.run.join import init_distributed
from nft_megatron.verify.rules import other_rules, rules_of
from nft_megatron.weights import read_shape

_METRICS_KEY = "nft_megatron.metrics"
_NUM_SHOWN = 8


@dataclass(frozen=True)
class Replayed:
    """The metrics of a step's updates, and the gradient of the first one by Hugging Face name (on rank 0)."""

    metrics: MetricsRow
    gradients: Mapping[str, Tensor]


def replay(run_dir: Path, step: int, overrides: Sequence[str], save: Path | None, against: Path | None) -> None:
    """Redo the updates of ``step`` and print how their metrics differ from the recorded ones. Called on every rank.

    Args:
        overrides: replace values of RUN/config.yaml; a new ``algorithm.name`` starts from that algorithm's defaults.
        save: safetensors file for the metrics and for the gradient of the first update.
        against: such a file, to compare with instead of RUN/metrics.jsonl.

    Raises:
        UserError: no such step, no checkpoint of the step before it, or a file that is not a saved replay.
    """
    folder = RunFolder(run_dir)
    config = replay_config(folder, overrides)
    with init_distributed(config) as topology:
        on_main(topology, lambda: _check_is_there(folder, step, config.rollout.max_staleness))
        on_main(topology, lambda: _tell_rules(folder.ledger(step), config.verify.grader))
        reference = on_main(topology, lambda: _recorded(folder, step) if against is None else _load_metrics(against))
        trainer = together(topology, lambda: build_trainer(config, topology, read_shape(config.model.path)))
        if step > 1:
            trainer.load(folder.checkpoint(step - 1))
        batch = trainer.prepare(folder.ledger(step), step)
        gradients: dict[str, Tensor] = {}
        if save or against:
            gradients = {name: gradient.cpu().clone() for name, gradient in trainer.gradients(batch.minibatches[0])}
        updates = [trainer.update(minibatch) for minibatch in batch.minibatches]
        row = trainer.summary(batch, updates)

        def tell() -> None:
            print(f"step {step} of {folder.root}, {config.algorithm.name}, {topology.world_size} processes")
            print(compare_metrics(reference, row))
            if against:
                print(compare_gradients(against, gradients))
            if save:
                save_replay(save, Replayed(row, gradients))

        on_main(topology, tell)


def replay_config(folder: RunFolder, overrides: Sequence[str]) -> Config:
    """The run's configuration after ``overrides``."""
    if not folder.config.is_file():
        raise UserError("replay", folder.root, "is not a run folder: it has no config.yaml", "give the run_dir of a run")
    tree = load_config(folder.config).model_dump(mode="json")
    name = next((text for key, _, text in (each.partition("=") for each in overrides) if key == "algorithm.name"), None)
    if name not in (None, tree["algorithm"]["name"]):
        tree["algorithm"] = {}
    return config_from(tree, overrides)


def _check_is_there(folder: RunFolder, step: int, max_staleness: int) -> None:
    ledgers = sorted(int(path.stem.removeprefix("step_")) for path in folder.ledgers.glob("step_*.parquet"))
    possible = [each for each in ledgers if each == 1 or folder.checkpoint(each - 1).is_dir()]
    if step not in possible:
        lacks = "ledger" if step not in ledgers else f"checkpoint of step {step - 1}, whose weights it started from"
        raise UserError(
            "--step",
            step,
            f"has no {lacks}",
            f"one of {', '.join(map(str, possible)) or 'none'}; checkpoint.every and checkpoint.keep decide what a run keeps",
        )
    check_step(folder.ledger(step), step, oldest=step - max_staleness)


def _tell_rules(ledger: Path, mode: str) -> None:
    """Say if the recorded verdicts, which a replay trains on, are not those of today's rules."""
    if (earlier := other_rules(read_verifiers(ledger), mode)) is not None:
        print(
            f"the verdicts in {ledger} are by {earlier}; today's rules are {rules_of(mode)}. The recorded ones are replayed; "
            f"`nft-megatron verify {ledger}` shows what would be judged differently"
        )


def _recorded(folder: RunFolder, step: int) -> MetricsRow:
    """The step's row of RUN/metrics.jsonl; empty if there is none."""
    return next((row for row in read_metrics(folder.root) if row["step"] == step), {})


def compare_metrics(reference: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """A table of the metrics in both, and a last line that says whether all are bit-identical.

    >>> print(compare_metrics({"loss": 0.5, "entropy": 2.0, "step": 3}, {"loss": 0.5, "entropy": 2.5, "grad_norm": 1.0}))
    metric                                    before                     now    difference
    loss                                         0.5                     0.5             0
    entropy                                      2.0                     2.5           0.5
    largest relative difference: 0.2 (entropy)
    """
    table = {name: (reference[name], value) for name, value in row.items() if name in reference}
    if not table:
        return "this step has no recorded metrics"
    lines, relative = [f"{'metric':24}{'before':>24}{'now':>24}{'difference':>14}"], {}
    for name, (before, now) in table.items():
        is_same = before == now or (math.isnan(before) and math.isnan(now))
        difference = 0.0 if is_same else abs(now - before)
        lines.append(f"{name:24}{before!r:>24}{now!r:>24}{difference:14.3g}")
        if not is_same:
            relative[name] = difference / max(abs(before), abs(now))
    if not relative:
        return "\n".join([*lines, "bit-identical"])
    worst = max(relative, key=lambda name: relative[name])
    return "\n".join([*lines, f"largest relative difference: {relative[worst]:.2g} ({worst})"])


def save_replay(path: Path, replayed: Replayed) -> None:
    """Write ``replayed`` as safetensors, completely or not at all."""
    with atomic_file(path) as temporary:
        save_file(dict(replayed.gradients), temporary, metadata={_METRICS_KEY: json.dumps(replayed.metrics)})


def _load_metrics(path: Path) -> MetricsRow:
    try:
        with safe_open(path, framework="pt") as file:
            metrics = json.loads((file.metadata() or {})[_METRICS_KEY])
        return {str(name): value for name, value in metrics.items() if isinstance(value, int | float)}
    except (OSError, KeyError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
        raise UserError("--against", path, f"is not a saved replay: {error}", "write one with --save") from error


def compare_gradients(path: Path, gradients: Mapping[str, Tensor]) -> str:
    """How the first update's gradient differs from the saved one: as a whole, and its worst tensors.

    A tensor's difference is its largest entry relative to the largest entry of the saved tensor.
    """
    squares, norm, errors = 0.0, 0.0, {}
    with safe_open(path, framework="pt") as file:
        missing = sorted(set(file.keys()) ^ set(gradients))
        for name in sorted(set(file.keys()) & set(gradients)):
            before, now = file.get_tensor(name).double(), gradients[name].double()
            squares += float((now - before).square().sum())
            norm += float(before.square().sum())
            errors[name] = float((now - before).abs().max() / before.abs().max().clamp(min=1e-300))
    lines = [f"gradient of the first update: |difference| / |before| = {math.sqrt(squares / norm) if norm else math.nan:.2g}"]
    lines += [f"  {errors[name]:.2g}  {name}" for name in sorted(errors, key=lambda name: -errors[name])[:_NUM_SHOWN]]
    lines += [f"  only one of the two has {name}" for name in missing]
    return "\n".join(lines)
