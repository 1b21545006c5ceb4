"""The comparison's arithmetic, and the whole of it with two steps on a task that needs no cold start."""

import doctest
import json
import math
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nft_megatron.observe.metrics import read_metrics

PAPER = Path(__file__).parents[2] / "examples" / "paper"


@pytest.fixture(scope="module", autouse=True)
def modules():
    sys.path.insert(0, str(PAPER))
    yield
    sys.path.remove(str(PAPER))


def test_the_examples_of_its_docstrings():
    import statistics_of_runs
    import variants

    for module in (statistics_of_runs, variants):
        outcome = doctest.testmod(module)
        assert outcome.attempted and not outcome.failed


def test_power_is_that_of_the_paired_t_test():
    """Against the textbook's t for 3 and 7 degrees of freedom."""
    from statistics_of_runs import half_width, mean_and_deviation, smallest_visible

    assert smallest_visible(0.014, 4) == pytest.approx((3.182 + 0.978) * 0.014 / 2)
    assert smallest_visible(0.026, 8) == pytest.approx((2.365 + 0.896) * 0.026 / math.sqrt(8))
    assert half_width(0.02, 4) == pytest.approx(3.182 * 0.01)
    assert mean_and_deviation([2.0, 4.0, 9.0]) == pytest.approx((5.0, math.sqrt(13)))


def test_curves_over_samples_and_their_last_quarter():
    from statistics_of_runs import accuracy_by_samples, entropy_by_samples, late_mean, value_at

    rows = [
        {"groups_sampled": 3, "entropy_sampled": 0.4, "eval_accuracy_initial": 0.1},
        {"groups_sampled": 5, "entropy_sampled": 0.3, "eval_accuracy": 0.5},
        {"groups_sampled": 2, "entropy_sampled": 0.2},
        {"groups_sampled": 6, "entropy_sampled": 0.1, "eval_accuracy": 0.7},
    ]
    points = accuracy_by_samples(rows, 4)
    assert points == [(0, 0.1), (32, 0.5), (64, 0.7)]
    assert [value_at(points, n) for n in (0, 8, 48, 64, 99)] == pytest.approx([0.1, 0.2, 0.6, 0.7, 0.7])
    assert late_mean(points, 64) == pytest.approx(0.65)  # a straight line from 48 to 64
    assert entropy_by_samples(rows, 4) == [(0, 0.4), (12, 0.3), (32, 0.2), (40, 0.1)]  # of the weights before the step


@pytest.mark.parametrize(
    ("kind", "mean", "expected"),
    [
        ("above", 0.021, "seen"),
        ("above", 0.019, "not shown"),
        ("above", -0.021, "the opposite"),
        ("below", -0.021, "seen"),
        ("below", 0.021, "the opposite"),
        ("at least", -0.009, "seen"),
        ("at least", -0.011, "not shown"),
        ("at least", -0.021, "the opposite"),
        ("about", 0.009, "seen"),
        ("about", -0.011, "not shown"),
        ("about", -0.051, "the opposite"),
    ],
)
def test_a_finding_is_seen_where_the_whole_interval_says_so(kind, mean, expected):
    """Half of the interval is 2 points, and 3 points count as about equal."""
    from statistics_of_runs import verdict

    assert verdict(kind, mean, 0.02, 0.03) == expected


def words(picture: Path) -> set[str | None]:
    return {text.text for text in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")}


def test_the_page_of_known_curves(tmp_path):
    """RFT is 4, 5, 6 and 5 points below NFT: 5 ± 1.3 points (t = 3.182 times a deviation of 0.816 by √4)."""
    from page import write_page
    from variants import ALGORITHMS, EPSILON, OMEGA, WEIGHT, folder_name

    for seed, lead in enumerate((0.04, 0.05, 0.06, 0.05)):
        for name, overrides in (ALGORITHMS | OMEGA | EPSILON | WEIGHT).items():
            folder = tmp_path / f"seed{seed}" / folder_name(overrides)
            (folder / "hf").mkdir(parents=True, exist_ok=True)
            accuracy = 0.6 + 0.02 * seed - (lead if name == "RFT" else 0.0)
            row = {
                "groups_sampled": 10,
                "entropy_sampled": 0.02 if name == "RFT" else 0.05,
                "eval_accuracy": accuracy,
                "time/step": 9,
            }
            rows = [{"step": step, **row} for step in (1, 2)]
            rows[0] |= {"eval_accuracy_initial": 0.2, "entropy_sampled": 0.05}
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(tmp_path / "seed2" / "epsilon-0.5" / "hf")  # not finished
    page = write_page(tmp_path, 4, 16, "python compare.py", "settings of config.yaml").read_text()
    assert "the steps of all 48 runs took 0.2 hours together" in page  # 4 seeds of 12 variants, 2 steps of 9 seconds
    assert "over the last quarter of 320 sampled answers" in page
    assert "| NFT beats RFT | NFT less RFT: +5.0 ± 1.3 points | seen |" in page
    assert "| NFT and DAPO are about equal | NFT less DAPO: +0.0 ± 0.0 points | seen |" in page
    assert "| RFT's entropy falls | RFT, change: -0.0300 ± 0.0000 nats | seen |" in page
    assert "| NFT | 20.0 ± 0.0 | 63.0 ± 2.6 |  |  | 0.050 ± 0.000 | 0.050 ± 0.000 |" in page
    assert "| RFT | 20.0 ± 0.0 | 58.0 ± 2.2 | -5.0 ± 1.3 | 1.7 | 0.050 ± 0.000 | 0.020 ± 0.000 |" in page
    assert "| ε = 0.1 |" in page and "| ε = 0.5 |" not in page
    assert set(ALGORITHMS) < words(tmp_path / "comparison_algorithms.svg")
    assert {"ε = 0.001", "ω = 1", "weight 0.5"} < words(tmp_path / "comparison_ablations.svg")


def test_it_runs_what_it_compares(run_config, model_folder, question_file, tmp_path, monkeypatch):
    import compare

    monkeypatch.setattr(compare, "PRELOAD", ["launcher_preload"])  # the tests have one fork server
    config = run_config(
        train={"num_steps": 1, "updates_per_step": 1, "micro_batch_tokens": 128},
        evaluate={"every": 1},
        rollout={"questions_per_step": 2, "group_size": 4},
    )
    start = tmp_path / "paper" / "start" / "seed0"
    start.mkdir(parents=True)
    shutil.copytree(model_folder, start / "model")
    for name in ("train.parquet", "held_out.parquet"):
        shutil.copy(question_file, start / name)
    compare.main(["--seeds", "1", "--root", str(tmp_path / "paper"), "--config", str(config), "--pilot"])
    for name, num_steps in (("nft", 1), ("grpo", 2)):
        folder = tmp_path / "paper" / "seed0" / name
        rows = read_metrics(folder)
        assert [row["step"] for row in rows] == list(range(1, num_steps + 1))
        assert "eval_accuracy" in rows[-1] and (folder / "output.txt").read_text().startswith("$ nft-megatron train ")
    assert "| NFT less GRPO: " in (tmp_path / "paper" / "comparison.md").read_text()


def test_every_variant_is_a_configuration():
    from compare import tasks
    from variants import ALGORITHMS, EPSILON, OMEGA, WEIGHT

    from nft_megatron.config.load import load_config

    every = tasks(Path("runs/paper"), 2, ALGORITHMS | OMEGA | EPSILON | WEIGHT, PAPER / "config.yaml", [])
    assert len(every) == 2 * (6 + 2 + 3 + 2)  # NFT itself is one of three ω, four ε and three weights
    configs = [load_config(PAPER / "config.yaml", task.overrides) for task in every]
    assert {config.algorithm.name for config in configs} == {"nft", "rft", "grpo", "dr_grpo", "dapo", "infonca"}
    steps = {config.filters_prompts: (config.train.num_steps, config.evaluate.every) for config in configs}
    assert steps[False] == (2 * steps[True][0], 2 * steps[True][1])
