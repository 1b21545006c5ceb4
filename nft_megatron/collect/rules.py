"""Whether the answers that a run has already collected were judged by other rules than those of today."""

from __future__ import annotations

import logging
from pathlib import Path

from nft_megatron.base.errors import UserError
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.config.sections import VerifyConfig
from nft_megatron.data.ledger import read_verifiers
from nft_megatron.verify.modes import is_users_rules
from nft_megatron.verify.rules import other_rules, rules_of

log = logging.getLogger(__name__)


def earlier_rules(folder: RunFolder, settings: VerifyConfig) -> str | None:
    """The rules of the newest answers in ``folder`` if they are not those of ``settings`` today, else None. Warns of a change.

    Raises:
        UserError: the earlier rules or today's are a user's own, and ``verify.accept_rules`` does not name today's.
    """
    newest, mode = _newest(folder), settings.grader
    earlier = other_rules(read_verifiers(newest), mode) if newest is not None else None
    if earlier is not None:
        if (is_users_rules(earlier) or is_users_rules(rules_of(mode))) and settings.accept_rules != rules_of(mode):
            raise UserError(
                "verify.url" if settings.url else "verify.mode",
                mode,
                f"the answers in {newest} were judged by {earlier}; those to come would be judged by {rules_of(mode)}",
                f"restore what judged them, or continue with verify.accept_rules={rules_of(mode)}",
            )
        log.warning(
            "verify: the answers up to %s were judged by %s; those to come are judged by %s, and every ledger says by which. "
            "`nft-megatron verify %s` shows what would be judged differently",
            newest.stem if newest is not None else "",
            earlier,
            rules_of(mode),
            newest,
        )
    return earlier


def _newest(folder: RunFolder) -> Path | None:
    """The newest file with judged answers: a part of the step that is being collected, else the newest ledger."""
    ledgers = sorted(folder.ledgers.glob("step_*.parquet"))
    step = int(ledgers[-1].stem.removeprefix("step_")) + 1 if ledgers else 1
    return next(reversed([*ledgers, *folder.rounds(step)]), None)
