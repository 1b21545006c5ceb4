"""as_published.yaml beside config.yaml, and the numbers of docs/as_published.md against the formulas that they come from."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from nft_megatron.config.load import load_config
from nft_megatron.config.sections import OptimizerConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "as_published.md").read_text()
DEPARTURES = {
    "verify.mode": ("strict", "published-boxed"),
    "algorithm.beyond_cap": ("saturate", "zero"),
    "algorithm.rate_margin": (0.0, 0.02),
    "optimizer.warmup_updates": (10, 160),
    "optimizer.warmup_stair": (None, 16),
    "optimizer.decay_all": (False, True),
    "evaluate.every": (10, 2),
}
OWN = {
    "qwen2.5-math-7b-4k": {"train.denominator": ("tokens", 32_000), "evaluate.temperature": (1.0, 0.6)},
    "qwen2.5-32b-16k": {"train.denominator": ("tokens", 16_000)},
}


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


@pytest.mark.parametrize("name", OWN)
def test_the_configuration_differs_in_its_departures_alone(name: str):
    folder = ROOT / "examples" / name
    paper, published = (
        leaves(load_config(folder / f"{which}.yaml").model_dump(mode="json")) for which in ("config", "as_published")
    )
    found = {key: (paper[key], published[key]) for key in paper if paper[key] != published[key]}
    assert found.pop("run_dir")[1].endswith("-as-published")
    assert found == DEPARTURES | OWN[name]
    marked = [
        line.split(":")[0].strip() for line in (folder / "as_published.yaml").read_text().splitlines() if " # [p]" in line
    ]
    assert sorted(marked) == sorted(key.rpartition(".")[2] for key in found), "each is marked"
    for key in found:
        assert key.rpartition(".")[2] in PAGE, "each is on the page"


def test_the_pages_factors_of_the_gradient_are_tokens_over_the_denominator():
    rows = re.findall(r"^\| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 3
    for length, seven, thirty_two in rows:
        tokens = 512 * int(length.replace(",", ""))
        assert (seven, thirty_two) == (f"{tokens / (1000 * 32):.1f}", f"{tokens / (1000 * 128 / 8):.1f}")
    assert "14 to 115 times" in PAGE and (rows[0][1], rows[-1][2]) == ("14.3", "114.7")


def test_the_pages_sums_of_learning_rates_and_its_decay():
    published = OptimizerConfig(learning_rate=1.0, warmup_updates=160, warmup_stair=16)
    default = OptimizerConfig(learning_rate=1.0)
    sums = [sum(settings.learning_rate_at(update) for update in range(1, 161)) for settings in (published, default)]
    assert f"is {sums[0]:.0f} full ones as published, {sums[1]:.1f} by default" in PAGE
    decayed = 1 - math.prod(1 - 1e-6 * published.learning_rate_at(update) * 0.1 for update in range(1, 320 * 16 + 1))
    assert f"{100 * decayed:.2f} % in 320 steps" in PAGE
