"""What a run says while it waits for servers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from nft_megatron.base.deadline import Deadline
from nft_megatron.rollout.fleet.supervisor import ServerStats

log = logging.getLogger(__name__)

_QUIET_SECONDS = 10.0
"""So long a fleet that has served may take to load new weights before it is worth a line."""
_REPEAT_SECONDS = 60.0


class WaitNotice:
    """Logs what is awaited: at once, or after ``_QUIET_SECONDS`` if the fleet ``has_served``; again after changes."""

    def __init__(self, has_served: bool) -> None:
        self._next = Deadline.of(_QUIET_SECONDS if has_served else 0.0)
        self._told: str | None = None

    def look(self, serving: str, stats: Sequence[ServerStats], seconds_left: float, folder: Path) -> None:
        """Call it at every look. ``serving`` is in words, ``folder`` where servers register."""
        states = ", ".join(f"{server.name} {server.state}" for server in stats)
        has_changed = self._told is not None and states != self._told
        if not (self._next.has_passed or has_changed):
            return
        reasons = "; ".join(f"{server.name}: {server.reason}" for server in stats if server.reason)
        none = f"none has registered in {folder}: start one with `nft-megatron serve {folder.parent}`, or set fleet.servers"
        text = states or none
        log.warning(
            "waiting for servers, %.0f s at most: %s (%s)%s", seconds_left, serving, text, f"; {reasons}" if reasons else ""
        )
        self._next, self._told = Deadline.of(_REPEAT_SECONDS), states
