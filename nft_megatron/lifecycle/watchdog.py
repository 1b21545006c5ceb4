"""Ends a hung process and records where it hung.

A rank that waits for another in a collective, a file system that has disappeared, a silent engine: none of these ends a process
by itself, and the cluster keeps billing it. Each phase of a run has a deadline of silence. A thread watches the clock; when a
phase stays silent past its deadline, it writes the stacks of all threads of this process to RUN/logs/stall_rank<r>.txt, writes
an exit report (:mod:`nft_megatron.lifecycle.exit_report`) and ends the process, which ends the job and lets the scheduler
restart it. Should C code keep that thread from running, :mod:`nft_megatron.lifecycle.backstop` ends the process a little later.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from nft_megatron.base.errors import EXIT_STALLED
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.lifecycle.backstop import Backstop
from nft_megatron.lifecycle.exit_report import ExitReport, note_phase, write_exit_report, write_if_responsive
from nft_megatron.observe.progress import Progress

_CHECKS_PER_DEADLINE = 20
_LONGEST_NAP = 1.0
_GRACE_SECONDS = 30.0
"""The backstop's delay behind the watchdog, which may take 20 s for its reports; at most the deadline itself."""


@dataclass
class _Watched:
    phase: str
    limit: float
    last_sign: float


class Watchdog:
    """``deadlines`` maps phases to seconds of silence; other phases are not watched.

    ``note``, such as the step, is added to the report; it may be changed at any time.
    """

    note = ""

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        deadlines: Mapping[str, float],
        *,
        end: Callable[[int], NoReturn] = os._exit,
        clock: Callable[[], float] = time.monotonic,
        backstop: Backstop | None = None,
    ) -> None:
        self._run_dir, self._path = run_dir, RunFolder(run_dir).stall(rank)
        self._rank, self._deadlines, self._end, self._clock = rank, deadlines, end, clock
        self._backstop = backstop or Backstop(run_dir, rank)
        self._longest = max(deadlines.values(), default=math.inf)
        self._open: list[_Watched] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._arm(None, 0.0)  # C code may keep the thread from ever running
        nap = min([_LONGEST_NAP, *(limit / _CHECKS_PER_DEADLINE for limit in deadlines.values())])
        self._thread = threading.Thread(target=self._watch, args=(nap,), name="watchdog", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Watch the ``with`` block under the deadline of ``name``, which replaces that of an enclosing phase."""
        watched = _Watched(name, self._deadlines.get(name, float("inf")), self._clock())
        with self._lock:
            self._open.append(watched)
        self._begin(watched)
        try:
            yield
        except BaseException as error:
            note_phase(error, name)
            raise
        finally:
            with self._lock:
                self._open.remove(watched)
                enclosing = self._open[-1] if self._open else None
            self.alive()
            if enclosing is not None:
                self._begin(enclosing)

    def alive(self) -> None:
        """A sign of life: an answer came, an update is done. The deadline restarts."""
        with self._lock:
            if self._open:
                self._open[-1].last_sign = self._clock()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(2 * _LONGEST_NAP)
        self._backstop.close()

    def _watch(self, nap: float) -> None:
        while True:
            with self._lock:
                watched = self._open[-1] if self._open else None
                silent = self._clock() - watched.last_sign if watched else 0.0
            if watched is not None and silent > watched.limit:
                self._backstop.arm(_GRACE_SECONDS)
                self._report(watched, silent)
                self._end(EXIT_STALLED)
            self._arm(watched, silent)
            if self._closed.wait(nap):
                return

    def _arm(self, watched: _Watched | None, silent: float) -> None:
        limit = self._limit_of(watched)
        left = limit - silent if watched and watched.limit < math.inf else limit
        if limit < math.inf:
            self._backstop.arm(left + min(_GRACE_SECONDS, limit))

    def _limit_of(self, watched: _Watched | None) -> float:
        """Seconds without Python code that nothing explains; in a phase without a deadline the longest of all."""
        return min(watched.limit if watched else math.inf, self._longest)

    def _begin(self, watched: _Watched) -> None:
        """Tell the backstop of the phase that now begins or continues; C code may keep the watchdog's thread from doing so."""
        limit = f"deadlines.{watched.phase}_seconds" if watched.limit < math.inf else "the longest of deadlines"
        what = f"ran no Python code for {self._limit_of(watched):g} s ({limit}) in phase {watched.phase} {self.note}".rstrip()
        self._backstop.describe(watched.phase, f"{what}: C code held the interpreter's lock")
        self._arm(watched, 0.0)

    def _report(self, watched: _Watched, silent: float) -> None:
        line = f"rank {self._rank} has been silent for {silent:.0f} s in phase {watched.phase}"
        line += f" (allowed by deadlines.{watched.phase}_seconds: {watched.limit:g} s) {self.note}".rstrip()

        def write() -> None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("w") as report:
                report.write(f"{line}\n\n")
                report.flush()
                faulthandler.dump_traceback(report, all_threads=True)
            print(f"nft-megatron: {line}; the stacks of its threads are in {self._path}", file=sys.stderr, flush=True)

        write_if_responsive(write)  # the folder itself may have disappeared
        write_exit_report(self._run_dir, ExitReport.here(EXIT_STALLED, line, watched.phase))


class LifeSigns(Progress):
    """Forwards to ``shown``; every advance is a sign of life."""

    def __init__(self, shown: Progress, watchdog: Watchdog) -> None:
        self._shown, self._watchdog = shown, watchdog

    def phase(self, name: str, total: int | None = None) -> None:
        self._shown.phase(name, total)

    def advance(self, count: int = 1) -> None:
        self._watchdog.alive()
        self._shown.advance(count)

    def begin(self, step: int) -> None:
        self._shown.begin(step)

    def step_done(self, metrics: Mapping[str, Any]) -> None:
        self._shown.step_done(metrics)

    def __enter__(self) -> Progress:
        self._shown.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._shown.__exit__(*exception)
