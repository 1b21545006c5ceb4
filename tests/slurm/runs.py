"""A small run under the lab's Slurm: submitted as a user would, watched through the run folder and scontrol."""

import json
import sys
import time
from pathlib import Path

from nft_megatron.base.run_folder import RunFolder
from nft_megatron.lifecycle.exit_report import read_exit_reports
from nft_megatron.observe.metrics import is_wall_clock
from nft_megatron.slurm.job_folder import JobFolder


class SlurmRun:
    """``config`` is what was written for it; the job is submitted by :meth:`submit`."""

    def __init__(self, lab, config: Path, run_dir: Path) -> None:
        self.lab, self.config, self.root = lab, config, run_dir
        self.folder = JobFolder(RunFolder(run_dir))

    def command(self, *arguments, check=True):
        """``nft-megatron slurm …`` in the lab."""
        return self.lab.run(sys.executable, "-m", "nft_megatron", "slurm", *arguments, check=check, timeout=240)

    def submit(self, *overrides) -> str:
        self.command("submit", self.config, *overrides)
        return self.job_id

    @property
    def job_id(self) -> str:
        return self.folder.job_id()

    @property
    def attempts(self):
        return self.folder.attempts()

    def wait(self, condition, what, seconds=300):
        """Until ``condition()`` holds, whose value it returns; on the way out of time everything that is known is raised."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} after {seconds:g} s\n{self.known()}")
            time.sleep(0.05)
        return value

    def wait_step(self, step, seconds=300):
        """Until the row of ``step`` is written."""
        self.wait(lambda: len(self.rows()) >= step, f"no step {step}", seconds)

    def wait_end(self, seconds=600) -> str:
        """``finished``, ``fatal`` or ``stopped``."""
        name, _ = self.wait(self.folder.end, "no end", seconds)
        return name

    def rows(self) -> list[dict]:
        """Metrics without what depends on the machine's speed."""
        path = self.root / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last one may be half written
        return [{k: v for k, v in json.loads(line).items() if not is_wall_clock(k)} for line in lines]

    def known(self) -> str:
        """Logs and states, for a failed test."""
        texts = [str(self.lab.job(self.job_id))] if self.job_id else []
        texts += [str(attempt) for attempt in self.attempts] + [str(ending) for ending in read_exit_reports(self.root)]
        for log in [*self.root.glob("slurm/*.log"), *self.root.glob("logs/attempt_*/*.log")]:
            texts.append(f"---- {log.relative_to(self.root)}\n{log.read_text()[-3000:]}")
        return "\n".join(texts)


def processes() -> list[int]:
    """Of this machine."""
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]


def words_of(process) -> list[bytes]:
    """Its command line; empty when it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
