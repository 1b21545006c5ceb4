"""What a run reads back from its folder, with bytes changed at random: read, or refused with one line."""

import random
import shutil
from pathlib import Path

import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.collect.collector import CollectorState
from nft_megatron.config.load import load_config
from nft_megatron.data.kept_prompts import KeptPrompts
from nft_megatron.data.ledger import open_ledger, read_groups, read_meta, read_verifiers
from nft_megatron.lifecycle.exit_report import ExitReport, read_exit_reports, write_exit_report
from nft_megatron.observe.metrics import read_metrics
from nft_megatron.slurm.job_folder import Attempt, JobFolder

RECORDED = Path(__file__).parents[1] / "recorded_runs" / "v0_2_mcore019" / "run"
NUM_CHANGES = 250


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> RunFolder:
    """A recorded run's folder, with what a Slurm job and a fault leave beside."""
    root = tmp_path_factory.mktemp("changed") / "run"
    shutil.copytree(RECORDED, root)
    run, job = RunFolder(root), JobFolder(RunFolder(root))
    write_exit_report(root, ExitReport.here(1, "it failed", "update"))
    job.root.mkdir(exist_ok=True)
    job.save_attempt(Attempt(1, "7", ("n1", "n2"), began=1.0, ended=2.0, kind="failed", cause="rank 1", blamed=("n2",)))
    job.set_excluded({"n2": "two faults"})
    job.reopen()
    return run


def readers(run: RunFolder) -> dict[Path, list]:
    """What reads each file."""
    job, step = JobFolder(run), run.latest_step()
    assert step
    ledger = run.ledger(run.ledger_steps()[-1])

    def rows() -> None:
        with open_ledger(ledger) as opened:
            opened.tokens(opened.index().row)

    found: dict[Path, list] = {
        run.config: [lambda: load_config(run.config)],
        run.latest: [run.latest_step],
        run.root / "metrics.jsonl": [lambda: read_metrics(run.root)],
        run.end(0): [lambda: read_exit_reports(run.root)],
        run.checkpoint(step) / "collector.parquet": [lambda: CollectorState.load(run.checkpoint(step) / "collector.parquet")],
        ledger: [lambda: read_meta(ledger), lambda: read_groups(ledger), lambda: read_verifiers(ledger), rows],
        run.prompts: [lambda: KeptPrompts.read(run.prompts)],
        job.root / "attempts.json": [job.attempts],
        job.root / "excluded.json": [job.excluded],
        job.root / "since": [job.attempts_since_submit],
    }
    return {path: reads for path, reads in found.items() if path.exists()}


def changed(content: bytes, rng: random.Random) -> bytes:
    """Cut off, with a part doubled, missing or overwritten, or with a word of JSON or YAML in its place."""
    at, length = rng.randrange(len(content) + 1), rng.choice((1, 1, 2, 8, 64))
    words = (b"null", b"-1", b"1e400", b"9" * 5000, b'"\\ud800"', b"[" * 3000, b"{}", b"true", b"\x00", b"\xff", b"..", b"~")
    return rng.choice(
        (
            content[:at],
            content[:at] + content[at : at + length] * 2 + content[at + length :],
            content[:at] + content[at + length :],
            content[:at] + rng.randbytes(length) + content[at + length :],
            content[:at] + rng.choice(words) + content[at + length :],
        )
    )


def _is_read(read, which: str) -> bool:
    """Whether it was read rather than refused."""
    problem = ""
    try:
        read()
    except UserError as error:
        problem = str(error)
        is_one_line = problem.isprintable() and len(problem) < 2500
    except Exception as error:
        pytest.fail(f"{which}: {type(error).__name__}: {error}")
    assert not problem or is_one_line, which
    return not problem


@pytest.mark.slow
def test_every_file_of_a_run_is_read_or_refused_with_one_line(folder):
    files = readers(folder)
    assert len(files) >= 9
    for path, reads in files.items():
        content, refused = path.read_bytes(), 0
        for number in range(NUM_CHANGES):
            path.write_bytes(changed(content, random.Random(f"{path.name}/{number}")))
            for read in reads:
                refused += not _is_read(read, f"{path.name}, change {number}")
        path.write_bytes(content)
        for read in reads:
            read()
        assert refused or path.name.startswith("end_rank"), f"{path.name}: no change was refused"
