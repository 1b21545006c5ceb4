"""What of a run folder is deleted while a run trains: old checkpoints, and old ledgers and exports if the configuration says
how many to keep. The servers' weights have rules of their own (rollout/fleet). Called on rank 0.
"""

from __future__ import annotations

import math

from nft_megatron.base.atomic_io import atomic_file, remove
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.observe.metrics import read_metrics


def remove_old_checkpoints(folder: RunFolder, step: int, num_kept: int, num_best: int = 0) -> None:
    """Of the checkpoints up to ``step``, keep the ``num_kept`` newest and the ``num_best`` of the highest held-out accuracy.

    With ``num_best``, ``checkpoints/best`` names the best of those that are left: of equal ones the earliest.
    """
    steps = [other for other in folder.checkpoint_steps() if other <= step]
    best: list[int] = []
    if num_best:
        accuracies = held_out_accuracies(folder)
        best = sorted((other for other in steps if other in accuracies), key=lambda other: (-accuracies[other], other))
    for old in set(steps[:-num_kept]) - set(best[:num_best]):
        remove(folder.checkpoint(old))
    if best:
        with atomic_file(folder.best, make_folder=False) as temporary:
            temporary.write_text(folder.checkpoint(best[0]).name)


def held_out_accuracies(folder: RunFolder) -> dict[int, float]:
    """The accuracy of each step's weights, of the steps that were evaluated, from RUN/metrics.jsonl."""
    found: dict[int, float] = {}
    for row in read_metrics(folder.root):
        step, accuracy = row.get("eval_step", row["step"]), row.get("eval_accuracy")
        if isinstance(step, int) and isinstance(accuracy, int | float) and math.isfinite(accuracy):  # NaN: none was judged
            found[step] = accuracy
    return found


def remove_old_ledgers(folder: RunFolder, step: int, num_kept: int | None, num_checkpoints: int) -> None:
    """Keep the ``num_kept`` newest ledgers, and those from which a run that resumes at any of the ``num_checkpoints`` newest
    checkpoints up to ``step`` would train again.

    With None, or before the first checkpoint, all.
    """
    checkpoints = [other for other in folder.checkpoint_steps() if other <= step][-num_checkpoints:]
    if num_kept is None or not checkpoints:
        return
    for old in folder.ledger_steps()[:-num_kept]:
        if old < checkpoints[0]:
            folder.ledger(old).unlink(missing_ok=True)


def remove_old_exports(folder: RunFolder, num_kept: int | None) -> None:
    """Keep the ``num_kept`` newest Hugging Face exports; with None, all."""
    for step in folder.export_steps()[:-num_kept] if num_kept is not None else ():
        remove(folder.export(step))
