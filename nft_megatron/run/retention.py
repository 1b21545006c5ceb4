"""What of a run folder is deleted while a run trains: old ledgers and exports, if the configuration says how many to keep.

Checkpoints and the servers' weights have rules of their own (checkpoints.py, rollout/fleet). Called on rank 0.
"""

from __future__ import annotations

from nft_megatron.base.atomic_io import remove
from nft_megatron.base.run_folder import RunFolder


def remove_old_ledgers(folder: RunFolder, num_kept: int | None) -> None:
    """Keep the ``num_kept`` newest ledgers, and those from which a run that resumes at any kept checkpoint would train again.

    With None, or before the first checkpoint, all.
    """
    checkpoints = folder.checkpoint_steps()
    if num_kept is None or not checkpoints:
        return
    steps = folder.ledger_steps()
    for step in steps[:-num_kept]:
        if step < checkpoints[0]:
            folder.ledger(step).unlink(missing_ok=True)


def remove_old_exports(folder: RunFolder, num_kept: int | None) -> None:
    """Keep the ``num_kept`` newest Hugging Face exports; with None, all."""
    for step in folder.export_steps()[:-num_kept] if num_kept is not None else ():
        remove(folder.export(step))
