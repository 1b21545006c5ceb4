"""Which question a stream may ask, and which closed groups a step trains on: pure, so that it can be simulated.

A question asked while the engine holds version v has the *deadline* v + 1 + s with s = ``rollout.max_staleness``: the last step
that may train all its answers. :meth:`Admission.choose` never forms a step before all groups with its deadline have closed, and
then trains all of them: so none becomes too old, whatever is asked. A step has Q = ``rollout.questions_per_step`` groups; more
only if more are due. :meth:`Admission.may_ask` sees to it that few more are: with n groups waiting, m in flight and a share p
of mixed questions, it asks as long as n + p·m groups fit into the steps up to the deadline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nft_megatron.config.sections import RolloutConfig


@dataclass(frozen=True)
class Admission:
    """The rules of one run. ``num_answers``: in progress, at most, unless a single group has more. ``least_mixed``: share of
    mixed questions to count with at least; where all questions are trained, 1.

    >>> rules = Admission(questions_per_step=2, max_staleness=1, group_size=4, num_answers=20, last_step=9)
    >>> common = {"step": 1, "version": 0, "num_waiting": 1, "mixed_rate": 0.5}
    >>> rules.may_ask(**common, num_in_flight=5, num_unfinished=16)
    True
    >>> rules.may_ask(**common, num_in_flight=6, num_unfinished=16)  # 1 + 6/2 groups probably fill steps 1 and 2
    False
    >>> rules.may_ask(**common, num_in_flight=5, num_unfinished=17)  # 20 answers at most
    False
    """

    questions_per_step: int
    max_staleness: int
    group_size: int
    num_answers: int
    last_step: int
    order: Literal["closed", "question"] = "closed"
    least_mixed: float = 0.0

    @classmethod
    def of(cls, settings: RolloutConfig, last_step: int, filters_prompts: bool) -> Admission:
        """The rules that section ``rollout`` states; nothing is asked for steps after ``last_step``."""
        num_answers = settings.stream_answers or max(settings.questions_per_step * settings.group_size // 2, 1)
        return cls(
            settings.questions_per_step,
            settings.max_staleness,
            settings.group_size,
            num_answers,
            last_step,
            settings.stream_order,
            1 / settings.oversample if filters_prompts else 1.0,
        )

    def deadline(self, version: int) -> int:
        """The last step that may train answers whose oldest token is from ``version``."""
        return version + 1 + self.max_staleness

    def may_ask(
        self, *, step: int, version: int, num_waiting: int, num_in_flight: int, num_unfinished: int, mixed_rate: float | None
    ) -> bool:
        """Whether to ask one more question while the ledger of ``step`` is the next to be written.

        ``num_waiting``: groups that wait to be trained; ``num_unfinished``: answers in progress; ``mixed_rate``: the share of
        mixed questions, as far as it is known.
        """
        last = min(self.deadline(version), self.last_step)
        has_room = num_unfinished == 0 or num_unfinished + self.group_size <= self.num_answers
        rate = 1.0 if mixed_rate is None else max(mixed_rate, self.least_mixed)
        return has_room and num_waiting + rate * num_in_flight < (last - step + 1) * self.questions_per_step

    def choose(
        self, step: int, closed: Mapping[int, int], in_flight: Mapping[int, int], mixed_rate: float | None = None
    ) -> list[int] | None:
        """The groups of ``step``, or None while it must wait for more to close.

        Both map group ids to deadlines; ``closed`` has groups that may be trained, in the order in which they closed.

        >>> rules = Admission(2, max_staleness=1, group_size=4, num_answers=20, last_step=9)
        >>> rules.choose(2, {7: 3, 5: 3, 6: 3}, {4: 3})
        [7, 5]
        >>> rules.choose(2, {7: 3, 5: 3, 6: 2}, {4: 3})  # group 6 has no later step
        [7, 6]
        >>> rules.choose(2, {7: 3, 5: 3, 6: 3}, {4: 2}) is None  # nor has group 4, which is in flight
        True
        >>> rules.choose(2, {7: 2, 5: 2, 6: 2}, {})
        [7, 5, 6]
        """
        quota = self.questions_per_step
        if len(closed) < quota or any(deadline <= step for deadline in in_flight.values()):
            return None
        due = {group for group, deadline in closed.items() if deadline <= step}
        if self.order == "question":
            first = sorted(closed, key=lambda group: (closed[group], group))[: max(quota, len(due))]
            last = closed[first[-1]], first[-1]
            return None if any((deadline, group) < last for group, deadline in in_flight.items()) else first
        rate = 1.0 if mixed_rate is None else mixed_rate
        taken = due
        later = sorted({deadline for deadline in closed.values() if deadline > step})
        for deadline in later:  # leave no more than the steps up to it have room for
            num_due = sum(each <= deadline for each in closed.values())
            num_due += round(rate * sum(each <= deadline for each in in_flight.values()))
            num_missing = min(num_due - (deadline - step) * quota, quota) - len(taken)
            urgent = [group for group, each in closed.items() if each <= deadline and group not in taken]
            taken.update(urgent[: max(num_missing, 0)])
        spare = [group for group in closed if group not in taken]
        taken.update(spare[: max(quota - len(taken), 0)])
        return [group for group in closed if group in taken]
