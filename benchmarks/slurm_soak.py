"""A run under a real Slurm to which one thing after another happens, against the same run left alone.

    python benchmarks/slurm_soak.py --incidents 50 --seed 0

Needs root and Debian's Slurm (the message says which packages). Four nodes on this machine, a rank on two of them, a file
system of its own for the run folder. Whenever a step was finished since the last one, a random incident of
tests/slurm/incidents.py strikes: time limits, preemptions, lost nodes, killed and stopped ranks, damaged checkpoints, a full
disk, a folder that goes away for 30 s. At the end the run is stopped, submitted again with a last step, and compared with one
that ran through.

Printed: how often each happened, how the attempt ended, the time until a step was finished again; and then

  metrics    rows of metrics.jsonl that differ from the undisturbed run's (all but what depends on the clock)
  ledger     rows lost, doubled or different
"""

from __future__ import annotations

import argparse
import platform
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import make_model, write_questions
from slurm.lab import Lab, missing
from slurm.runs import SlurmRun
from small_disk import mounted

from slurm import incidents

CLOCK = ("verify_seconds", "generate_seconds")
NEVER = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--incidents", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    print(f"# python benchmarks/slurm_soak.py --incidents {options.incidents} --seed {options.seed} · {platform.machine()}")
    with tempfile.TemporaryDirectory() as folder, Lab() as lab, mounted(Path(folder) / "disk", "256m") as disk:
        config = write_config(Path(folder), disk / "run", NEVER)
        run = SlurmRun(lab, config, disk / "run")
        run.submit()
        strike(run, options.incidents, random.Random(options.seed))
        run.wait_step(len(run.rows()) + 1, 300)
        run.command("stop", run.root)
        run.wait_end()
        lab.wait_state(run.job_id, ("COMPLETED", "FAILED"), seconds=60)
        num_steps = len(run.rows()) + 1
        run.submit(f"train.num_steps={num_steps}")
        assert run.wait_end() == "finished", run.known()
        compare(run, leave_alone(lab, Path(folder), num_steps), num_steps)


def write_config(folder: Path, run_dir: Path, num_steps: int) -> Path:
    """Of the tests' small run, on two nodes."""
    if not (folder / "model").exists():
        make_model(folder / "model")
        write_questions(folder / "sums.parquet")
    path = folder / f"{run_dir.name}.yaml"
    tree = {
        "run_dir": str(run_dir),
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"train": str(folder / "sums.parquet"), "template": "plain", "max_prompt_tokens": 8, "instruction": "keep"},
        "rollout": {
            "questions_per_step": 4,
            "group_size": 8,
            "max_answer_tokens": 4,
            "processes": 0,
            "oversample": 2.0,
        },
        "optimizer": {"learning_rate": 1.0e-5, "warmup_updates": 2},
        "train": {"num_steps": num_steps, "updates_per_step": 2, "micro_batch_tokens": 64},
        "parallel": {"threads": 1, "timeout_seconds": 60.0},
        "deadlines": {
            "update_seconds": 15.0,
            "collect_seconds": 30.0,
            "other_seconds": 15.0,
            "save_seconds": 30.0,
            "heartbeat_seconds": 30.0,
        },
        "checkpoint": {"every": 1, "keep": 3},
        "observe": {"tensorboard": False},
        "cluster": {"trainer_nodes": 2, "gpus_per_node": 1},
        "slurm": {"gres": "", "time": "600", "preflight": False, "exclude_after": 1000, "max_failures": 1000},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def strike(run: SlurmRun, count: int, generator: random.Random) -> None:
    """One incident after another, each once a step was finished since the last; print what became of them."""
    happened: Counter[str] = Counter()
    kinds: defaultdict[str, Counter[str]] = defaultdict(Counter)
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for number in range(count):
        done = len(run.rows())
        run.wait_step(done + 1, 300)
        time.sleep(generator.uniform(0, 2))
        incident, attempt = incidents.random_incident(generator), run.attempts[-1].number
        began = time.monotonic()
        incident(run)
        done = len(run.rows())
        run.wait(lambda done=done: len(run.rows()) != done, f"no step after {incident.__name__}")
        name = incident.__name__
        happened[name] += 1
        seconds[name].append(time.monotonic() - began)
        kinds[name].update(each.kind for each in run.attempts if attempt <= each.number and each.kind)
        print(f"{number + 1:3} of {count}  {name}: {seconds[name][-1]:.0f} s", file=sys.stderr, flush=True)
        assert run.folder.end() is None, run.known()
    print(f"\n| {'incident':24} | times | attempts ended as            | s until the next step, median (max) |")
    print(f"|:{'-' * 24}-|------:|:-----------------------------|------------------------------------:|")
    for name, times in happened.most_common():
        ended = ", ".join(f"{kind} {number}" for kind, number in kinds[name].most_common())
        print(f"| {name:24} | {times:5} | {ended:28} | {np.median(seconds[name]):25.0f} ({max(seconds[name]):.0f}) |")


def leave_alone(lab: Lab, folder: Path, num_steps: int) -> SlurmRun:
    """The same run with nothing happening to it."""
    run = SlurmRun(lab, write_config(folder, folder / "alone", num_steps), folder / "alone")
    run.submit()
    assert run.wait_end(3600) == "finished", run.known()
    return run


def compare(run: SlurmRun, alone: SlurmRun, num_steps: int) -> None:
    rows, others = run.rows(), alone.rows()
    different = [row["step"] for row, other in zip(rows, others, strict=True) if row != other]
    print(f"\n{num_steps} steps in {len(run.attempts)} attempts")
    print(f"metrics: {len(different)} of {len(rows)} rows differ from the undisturbed run's {different[:5] or ''}")
    losses = [abs(row["loss"] - other["loss"]) for row, other in zip(rows, others, strict=True)]
    print(f"losses: largest difference {max(losses):g}")
    lost = doubled = 0
    for step in range(1, num_steps + 1):
        ours, theirs = (Counter(map(repr, ledger(each, step))) for each in (run, alone))
        lost += (theirs - ours).total()
        doubled += (ours - theirs).total()
    print(f"ledger: {lost} rows lost or different, {doubled} doubled or different")
    if different or lost or doubled:
        sys.exit(1)


def ledger(run: SlurmRun, step: int) -> list[dict]:
    """The rows of a step without what the clock says."""
    return pq.read_table(run.folder.run.ledger(step)).drop_columns(list(CLOCK)).to_pylist()


if __name__ == "__main__":
    main()
