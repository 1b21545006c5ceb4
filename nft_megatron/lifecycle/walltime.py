"""When the time of a run's job ends, and whether what comes next still fits before that.

A job that is ended by its time limit loses what it has under way. So a run leaves before: the updates of a step are begun only
while the time left is more than they, the publishing that follows and a checkpoint take:

    left ≥ reserve + 1.25 · Σ_phases max(last five measurements of this process)

Without a measurement a phase counts nothing: every start of a run tries at least one step. Collecting has no part in the sum,
as what is finished of it is kept.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

from nft_megatron.base.errors import UserError

_VARIABLES = ("NFT_MEGATRON_END_TIME", "SLURM_JOB_END_TIME")
_NUM_MEASUREMENTS = 5
_MARGIN = 1.25


class TimeLimit:
    """``end``: seconds since 1970, None: never. ``reserve``: seconds for leaving itself, and for what is not measured.

    ``phases`` are those that the next step brings after its collecting, the checkpoint included; twice, where another one is
    still being written.

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
    'the end of its time: 64 s are left, and the next update and save may take 65 s'
    """

    phases: tuple[str, ...] = ()

    def __init__(self, end: float | None, reserve: float, clock: Callable[[], float] = time.time) -> None:
        self._end = math.inf if end is None else end
        self._reserve, self._clock = reserve, clock
        self._measured: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_NUM_MEASUREMENTS))

    @classmethod
    def of_job(cls, reserve: float) -> TimeLimit:
        """That of the job this process belongs to: NFT_MEGATRON_END_TIME, else SLURM_JOB_END_TIME, else none."""
        for name in _VARIABLES:
            if value := os.environ.get(name):
                try:
                    return cls(float(value), reserve)
                except ValueError as error:
                    raise UserError(name, value, "is not a time", "give seconds since 1970, or unset it") from error
        return cls(None, reserve)

    @contextlib.contextmanager
    def measuring(self, phase: str) -> Iterator[None]:
        """Measure the ``with`` block, unless it fails."""
        begin = self._clock()
        yield
        self.measured(phase, self._clock() - begin)

    def measured(self, phase: str, seconds: float) -> None:
        """``phase`` took ``seconds``."""
        self._measured[phase].append(seconds)

    @property
    def needed(self) -> float:
        """Seconds that ``phases`` may take, with the reserve."""
        return self._reserve + _MARGIN * sum(max(self._measured[phase], default=0.0) for phase in self.phases)

    def reason(self) -> str | None:
        """Why to leave now, None while ``phases`` still fit."""
        left = self._end - self._clock()
        if left >= self.needed:
            return None
        what = " and ".join(dict.fromkeys(self.phases))
        return f"the end of its time: {left:.0f} s are left, and the next {what} may take {self.needed:.0f} s"
