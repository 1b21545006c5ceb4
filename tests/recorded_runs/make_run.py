"""Records a small run that was killed in the middle of its third step, for the tests of later versions.

    PYTHONPATH=tests python tests/recorded_runs/make_run.py FOLDER

FOLDER gets the run as the killed process left it (checkpoint of step 2, finished rounds of step 3), its model and questions,
and ``expected_step_3.json``, the metrics of step 3 of a run that nobody killed. ``v0_1`` was recorded by this script at commit
bc1da0b, with that version's names for the modules, keys and functions that it uses, and Megatron-Core 0.16.1 on Python 3.11;
``v0_2_mcore019`` with Megatron-Core 0.19.2 and torch 2.13.0 on Python 3.12, without the folders ``whole`` and ``run/logs``, the
export of step 1 and the lock.
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import yaml
from conftest import make_model, write_questions

from nft_megatron.cli.main import main
from nft_megatron.collect import collector

CONFIG = {
    "run_dir": "run",
    "model": {"path": "model", "dtype": "float32"},
    "data": {"train": "sums.parquet", "template": "plain", "max_prompt_tokens": 8, "instruction": "keep"},
    "rollout": {
        "questions_per_step": 4,
        "group_size": 8,
        "max_answer_tokens": 4,
        "processes": 0,
        "oversample": 2.0,
        "probe_questions": 2,
        "probe_tokens": 4,
    },
    "optimizer": {"learning_rate": 1.0e-3, "warmup_updates": 2},
    "train": {"num_steps": 3, "updates_per_step": 2, "micro_batch_tokens": 64},
    "parallel": {"threads": 1, "timeout_seconds": 60.0},
    "checkpoint": {"every": 1, "keep": 1, "export_every": 1, "asynchronous": False},
    "evaluate": {"data": "sums.parquet", "every": 2},
    "observe": {"tensorboard": False},
}


def train(run_dir: str, dies_at: str = "") -> None:
    """Train; die where the ledger ``dies_at`` would be written."""
    write = collector.write_ledger

    def write_or_die(path: Path, *arguments, **options) -> None:
        if path.name == dies_at:
            os._exit(9)
        write(path, *arguments, **options)

    collector.write_ledger = write_or_die
    main(["train", "config.yaml", f"run_dir={run_dir}"])


def record(folder: Path) -> None:
    folder.mkdir(parents=True)
    os.chdir(folder)
    make_model(Path("model"))
    write_questions(Path("sums.parquet"))
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    for arguments, code in (("whole",), 0), (("run", "step_000003.parquet"), 9):
        process = multiprocessing.get_context("spawn").Process(target=train, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == code
    rows = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    Path("expected_step_3.json").write_text(json.dumps(rows[2]) + "\n")


if __name__ == "__main__":
    record(Path(sys.argv[1]))
