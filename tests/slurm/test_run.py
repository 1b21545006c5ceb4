"""A real run on a real Slurm: whatever happens to it, it ends as if nothing had."""

import functools
import re

import pyarrow.parquet as pq
import pytest

from slurm import incidents

pytestmark = pytest.mark.timeout(1800)


QUICK = [(incidents.time_limit_near, "left", r"a person's USR1: stopped (after|while collecting) step")]
NIGHT = [  # what happens, the kind of the attempt's end, what its cause says; benchmarks/slurm_soak.py has more
    (incidents.rank_killed, "failed", r"rank 1 on n\d: Killed"),
    (incidents.first_node_lost, "lost", r"the agent on n\d disappeared: node lost"),
    (incidents.preemption, "left|lost", ""),
    (incidents.rank_stopped, "failed", r"rank 1 on n\d gave no sign of life while rank 0 waited in phase \w+"),
    (incidents.rank_0_stopped, "failed", r"rank 0 on n\d gave no sign of life"),
    (incidents.checkpoint_bit_flipped, "failed", "Killed"),
    (incidents.disk_full, "short", "No space left on device"),
    (functools.partial(incidents.folder_away, seconds=8), "failed|short|left", ""),
]


@pytest.mark.slow
@pytest.mark.parametrize("events", [QUICK, NIGHT], ids=["requeued once", "a night"])
def test_whatever_happens_the_run_continues_as_if_nothing_had(
    slurm_run, run_config, command, metrics_of, small_disk, tmp_path, events
):
    settings = {  # of a collective, long before any watchdog
        "parallel": {"threads": 1, "timeout_seconds": 30.0},
        "deadlines": {"heartbeat_seconds": 45.0},
    }
    if events is QUICK:  # nothing that a watchdog has to notice
        settings = {}
    root = small_disk("256m") / "run" if events is NIGHT else tmp_path / "run"
    run = slurm_run(root, train={"num_steps": 10_000}, slurm={"max_failures": 3}, **settings)
    run.submit()
    for incident, kind, cause in events:
        step, attempt = len(run.rows()), run.attempts[-1].number if run.attempts else 1
        run.wait_step(step + 2)
        incident(run)
        run.wait(lambda number=attempt: run.attempts[-1].number > number, f"no new attempt after {incident}")
        ended = next(each for each in run.attempts if each.number == attempt)
        assert re.fullmatch(kind, ended.kind), f"{incident}: {ended}"
        assert re.search(cause, ended.cause), f"{incident}: {ended}"
    run.wait_step(len(run.rows()) + 2)
    run.command("stop", run.root)
    assert run.wait_end() == "stopped"
    run.lab.wait_state(run.job_id, ("COMPLETED", "FAILED"))
    num_steps = len(run.rows()) + 1
    run.submit(f"train.num_steps={num_steps}")
    assert run.wait_end() == "finished"

    alone = command("train", run_config("alone", train={"num_steps": num_steps}), ranks=2)
    assert alone.returncode == 0, alone.stderr
    assert run.rows() == metrics_of(tmp_path / "alone")
    for step in range(1, num_steps + 1):
        ours, theirs = (
            pq.read_table(
                root / f"ledger/step_{step:06d}.parquet", columns=["group_id", "question_id", "answer_tokens", "label"]
            ).to_pylist()
            for root in (run.root, tmp_path / "alone")
        )
        assert ours == theirs, step
