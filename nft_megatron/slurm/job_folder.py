"""RUN/slurm: what a run's jobs remember from one attempt to the next.

RUN/slurm/job.sh  config.yaml         what was submitted
          job                         id of the newest job
          attempts.json               every attempt: its job, nodes, end and cause
          excluded.json               nodes not to be used again, with the reason
          since                       number of the last attempt before the newest submit
          finished | fatal | stopped  how the run ended: nothing is to start it again by itself
RUN/logs/attempt_0003/                trainer.log, rollout_<node>.log, preflight/<node>.json, and what ranks left
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.errors import UserError
from nft_megatron.base.run_folder import RunFolder

ENDS = ("finished", "fatal", "stopped")
Progress = tuple[int, int, int]


@dataclass(frozen=True)
class Attempt:
    """One start of the run under Slurm. ``kind`` says how it ended:

    ``finished``; ``left`` as it was asked to (preemption, a person); ``short`` of something (time, servers, disk); ``wrong``
    input; ``failed``; ``bad nodes`` in the preflight; ``lost`` with its first node. None while it runs.
    ``progress`` is what stood on the disk at its end, ``progress_before`` at its beginning. Times are seconds since 1970.
    """

    number: int
    job_id: str
    nodes: tuple[str, ...]
    began: float
    ended: float | None = None
    kind: str | None = None
    cause: str = ""
    blamed: tuple[str, ...] = ()
    progress: Progress = (0, 0, 0)
    progress_before: Progress = (0, 0, 0)


@dataclass(frozen=True)
class JobFolder:
    """Reads and writes RUN/slurm."""

    run: RunFolder

    @property
    def root(self) -> Path:
        return self.run.root / "slurm"

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def script(self) -> Path:
        return self.root / "job.sh"

    def logs(self, attempt: int) -> Path:
        return self.run.root / "logs" / f"attempt_{attempt:04d}"

    def progress(self) -> Progress:
        """How far the run is: step of the newest checkpoint, newest whole ledger, pieces of the step in progress."""
        ledgers = [int(path.stem.removeprefix("step_")) for path in self.run.ledgers.glob("step_*.parquet")]
        newest = max(ledgers, default=0)
        return self.run.latest_step() or 0, newest, len(self.run.rounds(newest + 1))

    def job_id(self) -> str | None:
        path = self.root / "job"
        return path.read_text().strip() if path.exists() else None

    def set_job_id(self, job_id: str) -> None:
        self._write("job", job_id)

    def attempts(self) -> list[Attempt]:
        """All of them, oldest first."""
        return [_attempt(row) for row in self._read("attempts.json", [])]

    def save_attempt(self, attempt: Attempt) -> None:
        """Add it, or put it in the place of what was known of it."""
        others = [other for other in self.attempts() if other.number != attempt.number]
        rows = [asdict(each) for each in sorted([*others, attempt], key=lambda each: each.number)]
        self._write("attempts.json", json.dumps(rows, indent=1))

    def excluded(self) -> dict[str, str]:
        """Nodes and why they are not used.

        Raises ``UserError`` where somebody's editing left what is no JSON.
        """
        try:
            return self._read("excluded.json", {})
        except ValueError as error:
            path = self.root / "excluded.json"
            raise UserError(str(path), str(error), "is no JSON any more", "mend it, or delete it to use all nodes") from error

    def set_excluded(self, nodes: Mapping[str, str]) -> None:
        self._write("excluded.json", json.dumps(dict(nodes), indent=1))

    def end(self) -> tuple[str, str] | None:
        """How the run ended and why, one of :data:`ENDS`; None while it is to continue."""
        for name in ENDS:
            if (self.root / name).exists():
                return name, (self.root / name).read_text()
        return None

    def set_end(self, name: str, reason: str) -> None:
        assert name in ENDS
        self._write(name, reason)

    @property
    def stopping(self) -> Path:
        """There once a person asked the run to stop, and not to be started again."""
        return self.root / "stopping"

    def reopen(self) -> None:
        """Somebody submits the run again: it may continue, and fail as often as at first."""
        for name in (*ENDS, self.stopping.name):
            (self.root / name).unlink(missing_ok=True)
        self.run.stop.unlink(missing_ok=True)
        self._write("since", str(max((attempt.number for attempt in self.attempts()), default=0)))

    def attempts_since_submit(self) -> list[Attempt]:
        """Those that decide whether it continues."""
        since = int(self._read("since", 0))
        return [attempt for attempt in self.attempts() if attempt.number > since]

    def _read(self, name: str, default: Any) -> Any:
        path = self.root / name
        return json.loads(path.read_text()) if path.exists() else default

    def _write(self, name: str, text: str) -> None:
        with atomic_file(self.root / name, make_folder=False) as temporary:
            temporary.write_text(text)


def _attempt(row: dict[str, Any]) -> Attempt:
    """JSON has lists where an attempt has tuples."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Attempt(**values)
