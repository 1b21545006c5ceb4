"""The status of a run under Slurm, for people."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nft_megatron.config.schema import Config
from nft_megatron.observe.metrics import read_metrics
from nft_megatron.observe.progress import format_duration
from nft_megatron.slurm.job_folder import Attempt, JobFolder
from nft_megatron.slurm.render import job_name
from nft_megatron.slurm.submit import active_job
from nft_megatron.slurm.tools import jobs_named, show_job

_SHOWN = {
    "accuracy": "answers right",
    "eval_accuracy": "held-out accuracy",
    "loss": "loss",
    "entropy": "entropy",
    "time/step": "seconds per step",
}


@dataclass(frozen=True)
class Status:
    """``job`` holds the fields of ``scontrol show job``, empty if Slurm knows no job; ``waiting`` are the following jobs of its
    name; ``last`` is the newest row of metrics.
    """

    run_dir: str
    job: dict[str, str]
    waiting: list[str]
    end: tuple[str, str] | None
    step: int
    num_steps: int
    last: dict[str, Any]
    attempts: list[Attempt]
    excluded: dict[str, str]

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def read_status(folder: JobFolder, config: Config) -> Status:
    """Read the status from Slurm and the run folder."""
    job_id = active_job(folder, job_name(config)) or folder.job_id()
    job = show_job(job_id) if job_id else {}
    waiting = jobs_named(job.get("JobName", job_name(config)), "PENDING")
    last: dict[str, Any] = next(reversed(read_metrics(folder.run.root)), {})
    return Status(
        run_dir=str(folder.run.root),
        job=job,
        waiting=[other for other in waiting if other != job_id],
        end=folder.end(),
        step=int(last.get("step", 0)),
        num_steps=config.train.num_steps,
        last=last,
        attempts=folder.attempts(),
        excluded=folder.excluded(),
    )


def show(status: Status, console: Console) -> None:
    """Print it."""
    console.print(f"[bold]{status.run_dir}[/bold]", highlight=False)
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(status):
        facts.add_row(name, escape(value))
    console.print(facts)
    if status.attempts:
        table = Table("attempt", "nodes", "began", "took", "end", "cause", box=None, pad_edge=False, header_style="bold")
        for attempt in status.attempts[-10:]:
            took = (attempt.ended or time.time()) - attempt.began
            began = time.strftime("%d %b %H:%M", time.localtime(attempt.began))
            table.add_row(
                str(attempt.number),
                " ".join(attempt.nodes[:4]) + (" …" if len(attempt.nodes) > 4 else ""),
                began,
                format_duration(took),
                attempt.kind or "running",
                escape(attempt.cause),
            )
        console.print(table)


def _facts(status: Status) -> list[tuple[str, str]]:
    job = status.job
    if status.end is not None:
        rows = [("run", f"{status.end[0]}: {status.end[1]}")]
    elif job:
        reason = f" ({job['Reason']})" if job.get("Reason", "None") != "None" else ""
        times = f", {job['RunTime']} of {job['TimeLimit']}" if job["JobState"] == "RUNNING" else ""
        rows = [("job", f"{job['JobId']} {job['JobState']}{reason}{times}, restarted {job.get('Restarts', '0')} times")]
    else:
        rows = [("job", "none that Slurm knows; `nft-megatron slurm submit` resumes the run")]
    if status.waiting:
        rows.append(("then", " ".join(status.waiting)))
    bar = "█" * round(30 * status.step / status.num_steps)
    rows.append(("step", f"{status.step} of {status.num_steps}  {bar:░<30}"))
    rows += [(label, f"{status.last[name]:.4g}") for name, label in _SHOWN.items() if status.last.get(name) is not None]
    rows += [("excluded", f"{node}: {reason}") for node, reason in status.excluded.items()]
    return rows
