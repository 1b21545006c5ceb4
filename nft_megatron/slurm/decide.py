"""What follows the end of an attempt: the whole restart policy, without side effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

from nft_megatron.config.slurm import SlurmConfig
from nft_megatron.slurm.job_folder import Attempt


@dataclass(frozen=True)
class Decision:
    """``continue`` in another attempt without the nodes of ``exclude`` (node → reason), or end the run for good."""

    action: Literal["continue", "finished", "stopped", "fatal"]
    reason: str
    exclude: Mapping[str, str] = field(default_factory=dict)


def decide(
    attempts: Sequence[Attempt], settings: SlurmConfig, *, stopped: bool = False, excluded: Mapping[str, str] | None = None
) -> Decision:
    """Decide from all attempts so far, the last of which has just ended.

    ``stopped``: a person asked the run to end. ``excluded``: nodes that are already excluded.

    Input that is wrong from the start ends the run at once. A node is excluded when the preflight finds it bad, or when it is
    blamed ``exclude_after`` times in a row. The run gives up after ``max_failures`` attempts in a row that left nothing new on
    disk, and when more than ``max_excluded`` nodes are bad. Preemptions do not count: they say nothing about the run.

    >>> crash = [Attempt(n, "7", ("n1",), 0.0, 9.0, "failed", "rank 0: no memory") for n in range(1, 4)]
    >>> decide(crash[:2], SlurmConfig()).action
    'continue'
    >>> decide(crash, SlurmConfig()).reason
    '3 attempts in a row made no progress; the last one: rank 0: no memory'
    """
    last, excluded = attempts[-1], excluded or {}
    if last.kind == "finished":
        return Decision("finished", last.cause)
    if stopped:
        return Decision("stopped", last.cause)
    if last.kind == "wrong" and all(attempt.kind in ("wrong", "left", "bad nodes") for attempt in attempts):
        return Decision(
            "fatal", last.cause
        )  # a configuration that has run is right, and an unreachable file looks like a wrong one
    fruitless = num_fruitless(attempts)
    if fruitless >= settings.max_failures:
        return Decision("fatal", f"{fruitless} attempts in a row made no progress; the last one: {last.cause}")
    bad = {
        node: last.cause
        for node in last.blamed
        if last.kind == "bad nodes" or times_blamed(node, attempts) >= settings.exclude_after
    }
    if len(bad.keys() | excluded.keys()) > settings.max_excluded:
        nodes, limit = ", ".join(sorted(bad.keys() | excluded.keys())), settings.max_excluded
        return Decision("fatal", f"{nodes} are bad, more than slurm.max_excluded = {limit}; the last one: {last.cause}")
    return Decision("continue", last.cause, bad)


def num_fruitless(attempts: Sequence[Attempt]) -> int:
    """The newest attempts that changed nothing on disk. Those that were preempted or found a bad node do not count."""
    last, count = attempts[0].progress_before, 0
    bad: set[str] = set()
    for attempt in attempts:
        finds_bad_node = attempt.kind == "bad nodes" and not bad.issuperset(attempt.blamed)  # max_excluded bounds these
        if attempt.progress != last:
            last, count = attempt.progress, 0
        elif attempt.kind != "left" and not finds_bad_node:
            count += 1
        if attempt.kind == "bad nodes":
            bad.update(attempt.blamed)
    return count


def times_blamed(node: str, attempts: Sequence[Attempt]) -> int:
    """How often in a row ``node`` was blamed, counting back over the attempts it took part in."""
    took_part = (attempt for attempt in reversed(attempts) if node in attempt.nodes)
    return sum(1 for _ in takewhile(lambda attempt: node in attempt.blamed, took_part))
