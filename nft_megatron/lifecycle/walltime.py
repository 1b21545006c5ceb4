"""When the run's job reaches its time limit, and whether the next phases still fit.

A job ended by its time limit loses its work in progress. So a run exits earlier: a step's updates begin only while the time
left exceeds what they, the following weight update and a checkpoint take:

    left ≥ reserve + 1.25 · Σ_phases max(last five measurements of this process)

An unmeasured phase counts as zero: every start of a run tries at least one step. Collecting is not in the sum, because
finished groups are kept.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

from nft_megatron.base.errors import UserError

log = logging.getLogger(__name__)

_OURS, _SLURMS = "NFT_MEGATRON_END_TIME", "SLURM_JOB_END_TIME"
_GRACE_SECONDS = 300.0
"""A job that is being ended may still run for so long; Slurm's KillWait is 30 s by default."""
_NUM_MEASUREMENTS = 5
_MARGIN = 1.25


class TimeLimit:
    """``end``: seconds since 1970; None: never. ``reserve``: seconds for the exit itself and for what is not measured.

    ``phases`` are those of the next step after its collecting, including the checkpoint; the checkpoint counts twice while
    another one is still being written.

    >>> now = [1000.0]
    >>> limit = TimeLimit(1100.0, reserve=10.0, clock=lambda: now[0])
    >>> limit.phases = ("update", "save")
    >>> limit.measured("update", 40.0), limit.measured("save", 4.0)
    (None, None)
    >>> limit.needed
    65.0
    >>> limit.reason() is None
    True
    >>> now[0] = 1036.0
    >>> limit.reason()
    'the end of its time: 64 s are left, but the next update and save may take 65 s'
    """

    phases: tuple[str, ...] = ()

    def __init__(self, end: float | None, reserve: float, clock: Callable[[], float] = time.time) -> None:
        self._end = math.inf if end is None else end
        self._reserve, self._clock = reserve, clock
        self._measured: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_NUM_MEASUREMENTS))

    @classmethod
    def of_job(cls, reserve: float) -> TimeLimit:
        """The limit of this process's job: NFT_MEGATRON_END_TIME, else SLURM_JOB_END_TIME, else none.

        Slurm ends a job soon after its end, so a SLURM_JOB_END_TIME long past is that of another job, inherited by a shell that
        has outlived it, or 0 for no limit: it is ignored with a warning.
        """
        for name in (_OURS, _SLURMS):
            if value := os.environ.get(name):
                end = _time_of(name, value)
                if name == _OURS or end > time.time() - _GRACE_SECONDS:
                    return cls(end, reserve)
                log.warning("%s = %s is long past: ignored, as no job outlives its end; unset it", name, value)
        return cls(None, reserve)

    @contextlib.contextmanager
    def measuring(self, phase: str) -> Iterator[None]:
        """Measure the ``with`` block if it succeeds."""
        begin = self._clock()
        yield
        self.measured(phase, self._clock() - begin)

    def measured(self, phase: str, seconds: float) -> None:
        """Record that ``phase`` took ``seconds``."""
        self._measured[phase].append(seconds)

    @property
    def needed(self) -> float:
        """Seconds that ``phases`` may take, including the reserve."""
        return self._reserve + _MARGIN * sum(max(self._measured[phase], default=0.0) for phase in self.phases)

    def reason(self) -> str | None:
        """Why to exit now; None while ``phases`` still fit."""
        left = self._end - self._clock()
        if left >= self.needed:
            return None
        if left < 0:
            return f"the end of its time, {-left:.0f} s ago (by {_OURS} or {_SLURMS}: unset it if it is another job's)"
        what = " and ".join(dict.fromkeys(self.phases))
        return f"the end of its time: {left:.0f} s are left, but the next {what} may take {self.needed:.0f} s"


def _time_of(name: str, value: str) -> float:
    """Seconds since 1970. Raises :class:`UserError` if ``value`` is none."""
    try:
        if not math.isnan(seconds := float(value)):
            return seconds
    except ValueError:
        pass
    raise UserError(name, value, "is not a time", "give seconds since 1970, or unset it")
