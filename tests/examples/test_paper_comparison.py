"""The comparison's arithmetic, and the whole of it with two steps on a task that needs no cold start."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PAPER = Path(__file__).parents[2] / "examples" / "paper"


@pytest.fixture(scope="module", autouse=True)
def modules():
    sys.path.insert(0, str(PAPER))
    yield
    sys.path.remove(str(PAPER))


def test_power_is_that_of_the_paired_t_test():
    """Against the textbook's t for 3 and 7 degrees of freedom."""
    from statistics_of_runs import half_width, mean_and_deviation, smallest_visible

    assert smallest_visible(0.014, 4) == pytest.approx((3.182 + 0.978) * 0.014 / 2)
    assert smallest_visible(0.026, 8) == pytest.approx((2.365 + 0.896) * 0.026 / math.sqrt(8))
    assert half_width(0.02, 4) == pytest.approx(3.182 * 0.01)
    assert mean_and_deviation([2.0, 4.0, 9.0]) == pytest.approx((5.0, math.sqrt(13)))


def test_accuracy_after_equal_samples():
    from statistics_of_runs import accuracy_at, accuracy_by_samples

    rows = [
        {"groups_sampled": 3, "eval_accuracy_initial": 0.1},
        {"groups_sampled": 5, "eval_accuracy": 0.5},
        {"groups_sampled": 2},
        {"groups_sampled": 6, "eval_accuracy": 0.7},
    ]
    points = accuracy_by_samples(rows, 4)
    assert points == [(0, 0.1), (32, 0.5), (64, 0.7)]
    assert [accuracy_at(points, n) for n in (0, 8, 48, 64)] == pytest.approx([0.1, 0.2, 0.6, 0.7])


def test_every_variant_runs_and_the_page_shows_it(run_config, model_folder, question_file, tmp_path):
    config = run_config(
        train={"num_steps": 1, "updates_per_step": 1, "micro_batch_tokens": 128}, evaluate={"every": 1},
        rollout={"questions_per_step": 2, "answers_per_question": 4},
    )  # fmt: skip
    start = tmp_path / "paper" / "start" / "seed0"
    start.mkdir(parents=True)
    shutil.copytree(model_folder, start / "model")
    for name in ("train.parquet", "held_out.parquet"):
        shutil.copy(question_file, start / name)
    command = [sys.executable, PAPER / "compare.py", "--seeds", "1", "--root", tmp_path / "paper", "--config", config]
    done = subprocess.run([*command, "--pilot", "train.num_steps=2"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "paper" / "comparison.md").read_text()
    assert page.count("| NFT |") == page.count("| GRPO |") == 2  # accuracy and entropy
    assert (tmp_path / "paper" / "comparison.png").stat().st_size > 5000


def test_every_variant_is_a_configuration():
    from compare import tasks
    from variants import ALGORITHMS, EPSILON, OMEGA

    from nft_megatron.config_load import load_config

    every = tasks(Path("runs/paper"), 2, ALGORITHMS | OMEGA | EPSILON, PAPER / "config.yaml", [])
    assert len(every) == 2 * (6 + 2 + 3)  # NFT itself is one of three ω and of four ε
    configs = [load_config(PAPER / "config.yaml", task.overrides) for task in every]
    assert {config.algorithm.name for config in configs} == {"nft", "rft", "grpo", "dr_grpo", "dapo", "infonca"}
    assert {config.train.num_steps for config in configs if not config.filters_prompts} == {64}
