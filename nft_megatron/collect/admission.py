"""Which question a stream may ask, and which closed groups a step trains on: pure, so that it can be simulated.

A question asked while the engine holds version v has the *deadline* v + 1 + s with s = ``rollout.max_staleness``: the last step
that may train all its answers. Let n(d) be the number of groups, in flight or waiting, with a deadline up to d. All of them can
be trained in time, Q = ``rollout.questions_per_step`` a step, as long as before each step k

    n(d) ≤ (d − k + 1) · Q   for all d ≥ k.                                                                                (1)

:meth:`Admission.may_ask` keeps (1) for the newest deadline, which is the latest; :meth:`Admission.choose` forms step k so that
(1) holds for step k + 1. Groups in flight count as if they would be mixed, so that no verdict can break it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nft_megatron.config.sections import RolloutConfig


@dataclass(frozen=True)
class Admission:
    """The rules of one run. ``num_answers``: in progress, at most, unless a single group has more.

    >>> rules = Admission(questions_per_step=2, max_staleness=1, group_size=4, num_answers=8, last_step=9)
    >>> rules.may_ask(step=1, version=0, num_pending=3, num_unfinished=4)
    True
    >>> rules.may_ask(step=1, version=0, num_pending=4, num_unfinished=4)  # 4 groups already fill steps 1 and 2
    False
    >>> rules.may_ask(step=1, version=0, num_pending=3, num_unfinished=5)  # 8 answers at most
    False
    """

    questions_per_step: int
    max_staleness: int
    group_size: int
    num_answers: int
    last_step: int
    order: Literal["closed", "question"] = "closed"

    @classmethod
    def of(cls, settings: RolloutConfig, last_step: int) -> Admission:
        """The rules that section ``rollout`` states; nothing is asked for steps after ``last_step``."""
        num_answers = settings.stream_answers or max(settings.questions_per_step * settings.group_size // 2, 1)
        return cls(
            settings.questions_per_step,
            settings.max_staleness,
            settings.group_size,
            num_answers,
            last_step,
            settings.stream_order,
        )

    def deadline(self, version: int) -> int:
        """The last step that may train answers whose oldest token is from ``version``."""
        return version + 1 + self.max_staleness

    def may_ask(self, *, step: int, version: int, num_pending: int, num_unfinished: int) -> bool:
        """Whether to ask one more question while the ledger of ``step`` is the next to be written.

        ``num_pending``: groups in flight or waiting to be trained; ``num_unfinished``: answers in progress.
        """
        last = min(self.deadline(version), self.last_step)
        has_room = num_unfinished == 0 or num_unfinished + self.group_size <= self.num_answers
        return has_room and num_pending < (last - step + 1) * self.questions_per_step

    def choose(self, step: int, closed: Mapping[int, int], in_flight: Mapping[int, int]) -> list[int] | None:
        """The groups of ``step``, or None while it must wait for more to close.

        Both map group ids to deadlines; ``closed`` has groups that may be trained, in the order in which they closed.

        >>> rules = Admission(2, max_staleness=1, group_size=4, num_answers=8, last_step=9)
        >>> rules.choose(2, {7: 3, 5: 3, 6: 3}, {4: 3})
        [7, 5]
        >>> rules.choose(2, {7: 3, 5: 3, 6: 2}, {4: 3})  # group 6 has no later step
        [7, 6]
        >>> rules.choose(2, {7: 3, 5: 3, 6: 3}, {4: 2}) is None  # nor has group 4, which is in flight
        True
        """
        quota = self.questions_per_step
        if len(closed) < quota:
            return None
        if self.order == "question":
            chosen = sorted(closed, key=lambda group: (closed[group], group))[:quota]
            last = closed[chosen[-1]], chosen[-1]
            return None if any((deadline, group) < last for group, deadline in in_flight.items()) else chosen
        taken: set[int] = set()
        for deadline in sorted({*closed.values(), *in_flight.values()}):
            num_due = sum(each <= deadline for each in (*closed.values(), *in_flight.values()))
            num_missing = num_due - (deadline - step) * quota - len(taken)
            due = [group for group, each in closed.items() if each <= deadline and group not in taken]
            if num_missing > len(due):
                return None
            taken.update(due[: max(num_missing, 0)])
        spare = [group for group in closed if group not in taken]
        taken.update(spare[: quota - len(taken)])
        return [group for group in closed if group in taken]
