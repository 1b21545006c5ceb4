"""What follows the end of an attempt: the whole policy of restarting, without side effects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from nft_megatron.slurm.job_folder import Attempt

BLAMED_TWICE = 2


@dataclass(frozen=True)
class Decision:
    """``go on`` in another attempt without the nodes of ``exclude`` (node → reason), or end the run for good."""

    action: Literal["go on", "finished", "stopped", "fatal"]
    reason: str
    exclude: Mapping[str, str] = field(default_factory=dict)


def decide(
    attempts: Sequence[Attempt], *, stopped: bool, excluded: Mapping[str, str], max_failures: int, max_excluded: int
) -> Decision:
    """Look at all attempts so far, the last of which has just ended.

    ``stopped``: a person asked the run to end. ``excluded``: nodes that are left out already.

    A node is excluded when the preflight finds it bad, or when it is blamed for the end of two attempts. The run gives up after
    ``max_failures`` attempts in a row that left nothing new on the disk, and when more than ``max_excluded`` nodes are bad.
    Preemptions don't count as such attempts: they say nothing of the run.

    >>> crash = [Attempt(n, "7", ("n1",), 0.0, 9.0, "failed", "rank 0: no memory") for n in range(1, 4)]
    >>> decide(crash[:2], stopped=False, excluded={}, max_failures=3, max_excluded=8).action
    'go on'
    >>> decide(crash, stopped=False, excluded={}, max_failures=3, max_excluded=8).reason
    '3 attempts in a row made no progress; the last one: rank 0: no memory'
    """
    last = attempts[-1]
    if last.kind == "finished":
        return Decision("finished", last.cause)
    if stopped:
        return Decision("stopped", last.cause)
    if last.kind == "wrong":
        return Decision("fatal", last.cause)
    fruitless = num_fruitless(attempts)
    if fruitless >= max_failures:
        return Decision("fatal", f"{fruitless} attempts in a row made no progress; the last one: {last.cause}")
    exclude = _to_exclude(attempts, excluded)
    if len(exclude) + len(excluded) > max_excluded:
        bad = ", ".join(sorted({*excluded, *exclude}))
        return Decision("fatal", f"{bad} are bad, more than slurm.max_excluded = {max_excluded}; the last one: {last.cause}")
    return Decision("go on", last.cause, exclude)


def num_fruitless(attempts: Sequence[Attempt]) -> int:
    """The newest attempts that left nothing on the disk that was not there before, preempted ones not counted."""
    best, count = (0, 0, 0), 0
    for attempt in attempts:
        if attempt.progress > best:
            best, count = attempt.progress, 0
        elif attempt.kind != "left":
            count += 1
    return count


def _to_exclude(attempts: Sequence[Attempt], excluded: Mapping[str, str]) -> dict[str, str]:
    last = attempts[-1]
    blamed = Counter(node for attempt in attempts for node in attempt.blamed)
    return {
        node: last.cause
        for node in last.blamed
        if node not in excluded and (last.kind == "bad nodes" or blamed[node] >= BLAMED_TWICE)
    }
