"""A new run that begins from a step of another one, with another meaning: ``nft-megatron fork RUN NEW --step N …``.

The new run folder has that step's checkpoint (weights, optimizer, generators) as its own newest one and a configuration of its
own; the next step's number follows. Nothing of RUN is changed, and nothing else of it is needed afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nft_megatron.base.atomic_io import atomic_folder
from nft_megatron.base.errors import UserError
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.base.untrusted import read_json_object
from nft_megatron.config.load import dump_config, flatten
from nft_megatron.config.places import check_places
from nft_megatron.config.schema import Config
from nft_megatron.run.checkpoints import COLLECTOR
from nft_megatron.run.replay import replay_config

_CHECKSUMS = "checksums.json"
_ASKS = ("data", "model.path", "rollout", "seed", "verify.mode", "verify.url")
"""What decides which questions are asked in which order and what their answers are worth."""


def fork(run_dir: Path, target: Path, step: int | None, overrides: Sequence[str]) -> None:
    """Create the run folder ``target`` from ``step`` of ``run_dir``, by default its newest, and say how to train it.

    The new run goes on in the order of the questions unless a setting that decides on them has changed; then it begins anew.

    Raises:
        UserError: no such step, a target that is not empty, or a configuration that does not fit.
    """
    source, folder = RunFolder(run_dir), RunFolder(target)
    config = replay_config(source, overrides).model_copy(update={"run_dir": target})
    check_places(config)
    step = _step_of(source, step)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError("NEW", target, "is not empty", "name a folder that does not exist yet")
    if target.resolve().is_relative_to(run_dir.resolve()):
        raise UserError("NEW", target, f"lies in the run {run_dir}", "name a folder of its own")
    if config.train.num_steps <= step:
        remedy = f"set train.num_steps to more than {step}: the numbers of steps go on"
        raise UserError("train.num_steps", config.train.num_steps, f"the new run begins after step {step}", remedy)
    changed = changes(replay_config(source, ()), config)
    keeps_order = not any(key == name or key.startswith(f"{name}.") for key in changed for name in _ASKS)
    with atomic_folder(target) as temporary:
        new = RunFolder(temporary)
        new.make_folders()
        _link(source.checkpoint(step), new.checkpoint(step), keeps_order)
        if keeps_order and source.prompts.exists():
            shutil.copy2(source.prompts, new.prompts)
        new.latest.write_text(new.checkpoint(step).name)
        new.config.write_text(dump_config(config))
        origin = {"run": str(run_dir.resolve()), "step": step, "changed": changed}
        (temporary / "fork.json").write_text(json.dumps(origin, indent=1, ensure_ascii=False))
    for key, (before, now) in changed.items():
        print(f"  {key}: {before} → {now}")
    where = "" if keeps_order else ", with its questions from the beginning"
    print(f"{target} begins after step {step} of {run_dir}{where}")
    print(f"train it with: nft-megatron train {folder.config}")


def changes(before: Config, now: Config) -> dict[str, list[Any]]:
    """The settings that differ, each with both values; the run folder's path is none."""
    old, new = (flatten(config.model_dump(mode="json")) for config in (before, now))
    keys = [key for key in {**old, **new} if key != "run_dir" and old.get(key) != new.get(key)]
    return {key: [old.get(key), new.get(key)] for key in keys}


def _step_of(source: RunFolder, step: int | None) -> int:
    steps = source.checkpoint_steps()
    chosen = source.latest_step() if step is None else step
    if chosen not in steps:
        problem = "has no checkpoint" if chosen is not None else "the run has no checkpoint yet"
        remedy = f"one of {', '.join(map(str, steps)) or 'none'}; checkpoint.every and checkpoint.keep decide what a run keeps"
        raise UserError("--step", chosen, problem, remedy)
    assert chosen is not None
    return chosen


def _link(source: Path, target: Path, keeps_order: bool) -> None:
    """The checkpoint under another name: hard links, or copies where the file system has none. Its files never change.

    Without ``keeps_order`` the collector's state is left out, also from the checksums.
    """
    target.mkdir()
    left_out = () if keeps_order else (COLLECTOR, _CHECKSUMS)
    for file in sorted(source.iterdir()):
        if file.name not in left_out:
            try:
                os.link(file, target / file.name)
            except OSError:
                shutil.copy2(file, target / file.name)
    if not keeps_order:
        checksums = read_json_object(source / _CHECKSUMS, "checkpoint", "fork from another step")
        checksums.pop(COLLECTOR, None)
        (target / _CHECKSUMS).write_text(json.dumps(checksums, indent=1))
