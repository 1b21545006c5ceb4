"""Collecting without rounds: while steps train, a fixed number of answers is in progress, and a step takes groups that closed.

``admission.py`` says which question may be asked and which groups a step trains on. What is on disk at any time is the last
ledger, with the groups that wait and the positions that were in flight, and parts of the next step with all groups closed
since. From these a new process continues: it asks again what had not closed.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from nft_megatron.base.errors import StoppedEarly
from nft_megatron.base.records import Group
from nft_megatron.collect.admission import Admission
from nft_megatron.collect.collector import Collector, CollectorState, Gathered
from nft_megatron.collect.group_stream import GroupStream
from nft_megatron.collect.verdict_counts import describe_verdicts
from nft_megatron.data.ledger import check_step, read_groups, write_ledger
from nft_megatron.observe.metrics import MetricsRow

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class StreamCollector(Collector):
    """A :class:`Collector` whose answers in progress outlive the step. Its steps must be collected in order."""

    admission: Admission

    @functools.cached_property
    def groups(self) -> GroupStream:
        return GroupStream(self.client, self.settings.group_size, self.sampling, purpose="train")

    def finish(self) -> None:
        if "groups" in vars(self):
            self.groups.close()

    def _gather(self, step: int, state: CollectorState) -> Gathered:
        parts, groups = _Parts(self, step), self.groups
        sampled = parts.read()
        closed = {group.group_id for group in sampled}
        cursor = max([state.cursor, *(group_id + 1 for group_id in closed)])
        open_before, in_flight = [*state.in_flight, *range(state.cursor, cursor)], groups.in_flight
        again = deque(i for i in open_before if i not in closed and i not in in_flight)  # all, in a new process
        waiting: dict[int, Group] = {}
        num_too_old = num_tokens = 0
        batch = [*state.surplus, *sampled]
        chosen = None
        try:
            while True:
                if batch or not waiting:
                    waiting |= {group.group_id: group for group in batch if self._may_train(group)}
                    for group_id in [i for i, group in waiting.items() if self._deadline(group) < step]:
                        num_too_old += len(waiting.pop(group_id).answers)
                    chosen = self._choose(step, waiting, sampled, state.mixed_rate)
                if chosen is not None:
                    break
                while self._may_ask(step, len(waiting), state.mixed_rate):
                    position = again.popleft() if again else cursor
                    cursor = max(cursor, position + 1)
                    (prompt,) = self.order.take(position, 1)
                    groups.ask(position, prompt, self.rounds.lengths.get(prompt.question_id))
                batch = self._next(step)
                sampled += batch
                num_tokens += sum(len(answer.completion.tokens) for group in batch for answer in group.answers)
                parts.write(batch)
                if reason := self.interrupted():
                    text = "finished groups are saved, the same command resumes it"
                    raise StoppedEarly(f"stopped while collecting step {step} by {reason}; {text}")
        except StoppedEarly:  # also while it waited for servers
            parts.flush()
            raise
        trainable = [waiting.pop(i) for i in chosen] + list(waiting.values())
        positions = sorted([*groups.in_flight, *again])
        metrics: MetricsRow = {"groups_in_flight": len(positions)}
        return Gathered(sampled, trainable, len(chosen), num_too_old, cursor, num_tokens, metrics, positions)

    def _choose(
        self, step: int, waiting: dict[int, Group], sampled: Sequence[Group], mixed_rate: float | None
    ) -> list[int] | None:
        """The groups that the step trains, or None as long as it must wait for more."""
        deadlines = {i: self._deadline(group) for i, group in waiting.items()}
        in_flight = {i: self.admission.deadline(version) for i, version in self.groups.in_flight.items()}
        chosen = self.admission.choose(step, deadlines, in_flight, mixed_rate)
        if chosen is None and self._is_hopeless(step, sampled, waiting):
            return list(waiting)[: self.settings.questions_per_step]
        return chosen

    def _next(self, step: int) -> list[Group]:
        if (closed := self.groups.next(_POLL_SECONDS)) is None:
            return []
        group = Group(closed[0], step, *closed[1:])
        self.rounds.note_length(group)
        return [group]

    def _may_train(self, group: Group) -> bool:
        return group.is_mixed or bool(group.num_judged and not self.filters_prompts)

    def _may_ask(self, step: int, num_waiting: int, mixed_rate: float | None) -> bool:
        return self.admission.may_ask(
            step=step,
            version=self.groups.version,
            num_waiting=num_waiting,
            num_in_flight=len(self.groups),
            num_unfinished=self.groups.num_unfinished,
            mixed_rate=mixed_rate,
        )

    def _deadline(self, group: Group) -> int:
        return self.admission.deadline(min(answer.completion.weight_version for answer in group.answers))

    def _is_hopeless(self, step: int, sampled: Sequence[Group], waiting: dict[int, Group]) -> bool:
        """Whether the step has closed as many groups as ``rollout.max_rounds`` rounds have at most."""
        quota = self.settings.questions_per_step
        is_hopeless = len(sampled) >= self.settings.max_rounds * self.settings.oversample * quota
        if is_hopeless and waiting:
            log.warning(
                "step %d trains on %d of %d questions: %d questions gave no more (%s)",
                step,
                min(len(waiting), quota),
                quota,
                len(sampled),
                describe_verdicts(sampled),
            )
        return is_hopeless


class _Parts:
    """The groups closed for a step so far, in files that are written every ``rollout.save_seconds``."""

    def __init__(self, collector: StreamCollector, step: int) -> None:
        self._collector, self._step = collector, step
        self._unsaved: list[Group] = []
        self._num_parts, self._written_at = len(collector.folder.round_parts(step, 0)), time.monotonic()

    def read(self) -> list[Group]:
        paths = self._collector.folder.round_parts(self._step, 0)
        for path in paths:
            check_step(path, self._step, oldest=self._step)
        return [group for path in paths for group, _ in read_groups(path)]

    def write(self, groups: Sequence[Group]) -> None:
        self._unsaved += groups
        if time.monotonic() - self._written_at >= self._collector.settings.save_seconds:
            self.flush()

    def flush(self) -> None:
        if not self._unsaved:
            return
        with self._collector.client.timer.phase("ledger"):
            self._collector.folder.check_is_open()
            path = self._collector.folder.round_part(self._step, 0, self._num_parts)
            write_ledger(path, self._unsaved, fates=["sampled"] * len(self._unsaved), meta={})
        self._unsaved, self._num_parts, self._written_at = [], self._num_parts + 1, time.monotonic()
