"""RUN/slurm: what a run's jobs remember from one attempt to the next.

RUN/slurm/job.sh  config.yaml         what was submitted
          job                         id of the newest job
          attempts.json               every attempt: its job, nodes, end and cause
          excluded.json               nodes not to be used again, with the reason
          since                       number of the last attempt before the newest submit
          finished | fatal | stopped  how the run ended: nothing restarts it automatically
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
from nft_megatron.base.untrusted import parse_json

ENDS = ("finished", "fatal", "stopped")
Progress = tuple[int, int, int]


@dataclass(frozen=True)
class Attempt:
    """One start of the run under Slurm. ``kind`` says how it ended:

    ``finished``; ``left`` on request (preemption, a person); ``short`` of something (time, servers, disk); ``wrong`` input;
    ``failed``; ``bad nodes`` in the preflight; ``lost`` with its first node. None while it runs. ``progress`` is what was on
    disk at its end, ``progress_before`` at its beginning. Times are seconds since 1970.
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
        """The run's progress: step of the newest checkpoint, newest complete ledger, parts of the current step."""
        ledgers = [int(path.stem.removeprefix("step_")) for path in self.run.ledgers.glob("step_*.parquet")]
        newest = max(ledgers, default=0)
        return self.run.latest_step() or 0, newest, len(self.run.rounds(newest + 1))

    def job_id(self) -> str | None:
        path = self.root / "job"
        return path.read_text().strip() if path.exists() else None

    def set_job_id(self, job_id: str) -> None:
        self._write("job", job_id)

    def attempts(self) -> list[Attempt]:
        """All attempts, oldest first."""
        remedy = "repair it, or delete it to forget the earlier attempts"
        rows = self._read("attempts.json", [], remedy)
        try:
            return [_attempt(row) for row in rows]
        except (TypeError, AttributeError) as error:
            raise UserError(str(self.root / "attempts.json"), error, "is no list of attempts", remedy) from error

    def save_attempt(self, attempt: Attempt) -> None:
        """Add the attempt, or replace its record."""
        others = [other for other in self.attempts() if other.number != attempt.number]
        rows = [asdict(each) for each in sorted([*others, attempt], key=lambda each: each.number)]
        self._write("attempts.json", json.dumps(rows, indent=1))

    def excluded(self) -> dict[str, str]:
        """Excluded nodes and the reasons.

        Raises ``UserError`` if an edited file is no longer JSON.
        """
        remedy = "repair it, or delete it to use all nodes"
        nodes = self._read("excluded.json", {}, remedy)
        if not isinstance(nodes, dict) or not all(isinstance(reason, str) for reason in nodes.values()):
            raise UserError(str(self.root / "excluded.json"), nodes, "is no object of nodes and reasons", remedy)
        return nodes

    def set_excluded(self, nodes: Mapping[str, str]) -> None:
        self._write("excluded.json", json.dumps(dict(nodes), indent=1))

    def end(self) -> tuple[str, str] | None:
        """How the run ended, one of :data:`ENDS`, and why; None while it may continue."""
        for name in ENDS:
            if (self.root / name).exists():
                return name, (self.root / name).read_text()
        return None

    def set_end(self, name: str, reason: str) -> None:
        assert name in ENDS
        self._write(name, reason)

    @property
    def stopping(self) -> Path:
        """Exists once a person asked the run to stop and not restart."""
        return self.root / "stopping"

    def reopen(self) -> None:
        """The run is submitted again: it may continue, with a fresh count of failures."""
        for name in (*ENDS, self.stopping.name):
            (self.root / name).unlink(missing_ok=True)
        self.run.stop.unlink(missing_ok=True)
        self._write("since", str(max((attempt.number for attempt in self.attempts()), default=0)))

    def attempts_since_submit(self) -> list[Attempt]:
        """The attempts that decide whether the run continues."""
        remedy = "delete it to count all attempts"
        since = self._read("since", 0, remedy)
        if not isinstance(since, int):
            raise UserError(str(self.root / "since"), since, "is not the number of an attempt", remedy)
        return [attempt for attempt in self.attempts() if attempt.number > since]

    def _read(self, name: str, default: Any, remedy: str) -> Any:
        path = self.root / name
        try:
            return parse_json(path.read_bytes()) if path.exists() else default
        except ValueError as error:
            raise UserError(str(path), str(error), "is not valid JSON", remedy) from error

    def _write(self, name: str, text: str) -> None:
        with atomic_file(self.root / name, make_folder=False) as temporary:
            temporary.write_text(text)


def _attempt(row: dict[str, Any]) -> Attempt:
    """JSON has lists where an attempt has tuples."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Attempt(**values)
