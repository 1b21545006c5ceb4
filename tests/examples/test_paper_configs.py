"""The configs of the paper's two runs: its settings, and a plan that fits."""

import re
from pathlib import Path

import pytest

from nft_megatron.cli.main import main
from nft_megatron.config.load import load_config
from nft_megatron.config.schema import Config
from nft_megatron.plan.estimate import make_plan
from nft_megatron.plan.layouts import cluster_of, layout_of
from nft_megatron.plan.models import find_shape
from nft_megatron.plan.workload import Assumptions

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = ("qwen2.5-math-7b-4k", "qwen2.5-32b-16k")


def config_of(name: str) -> Config:
    return load_config(EXAMPLES / name / "config.yaml")


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_those_of_the_paper(name: str):
    config = config_of(name)
    assert (config.rollout.questions_per_step, config.rollout.group_size) == (512, 16)
    assert (config.rollout.temperature, config.rollout.top_p, config.rollout.max_staleness) == (1.0, 1.0, 0)
    assert (config.train.updates_per_step, config.train.num_steps, config.train.denominator) == (16, 320, "tokens")
    assert config.algorithm.model_dump() == {
        "name": "nft",
        "epsilon": 1.0,
        "prompt_weight": "one_minus_rate",
        "negative_weight": 1.0,
        "ratio_type": "token",
        "beyond_cap": "saturate",
        "rate_margin": 0.0,
    }
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_updates, optimizer.weight_decay) == (1e-6, 10, 0.1)
    assert (optimizer.beta1, optimizer.beta2, optimizer.clip_grad) == (0.9, 0.999, 1.0)
    assert config.model.dtype == "bfloat16"
    assert (config.evaluate.samples, config.evaluate.top_p) == (32, 0.7)


@pytest.mark.parametrize(
    ("name", "prompt", "answer", "evaluation"),
    [("qwen2.5-math-7b-4k", 512, 3584, 1.0), ("qwen2.5-32b-16k", 2048, 14336, 0.6)],
)
def test_lengths_and_evaluation_are_those_of_the_paper(name: str, prompt: int, answer: int, evaluation: float):
    config = config_of(name)
    assert (config.data.max_prompt_tokens, config.rollout.max_answer_tokens) == (prompt, answer)
    assert config.evaluate.temperature == evaluation
    assert (config.data.instruction, config.data.template) == ("boxed", "chat")


@pytest.mark.parametrize(
    ("name", "gpus", "trainers"),
    [
        ("qwen2.5-math-7b-4k", 64, 32),
        ("qwen2.5-math-7b-4k", 32, 16),
        ("qwen2.5-32b-16k", 128, 64),
        ("qwen2.5-32b-16k", 256, 128),
    ],
)
def test_the_plan_leaves_a_tenth_of_an_h100_free_and_has_room_to_generate(name: str, gpus: int, trainers: int):
    config = config_of(name)
    cluster = cluster_of(config, gpus)
    assert (cluster.gpu.name, cluster.num_trainers, cluster.num_rollout) == ("h100", trainers, gpus - trainers)
    shape, _ = find_shape(config.model.path)
    plan = make_plan(config, shape, cluster, layout_of(config, cluster), Assumptions())
    assert plan.training.peak <= 0.9 * 80e9
    assert plan.generation.servers.num_gpus == gpus - trainers
    # Tensor and context groups stay on NVLink.
    assert plan.training.layout.tensor * plan.training.layout.context <= cluster.gpus_per_node


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_shows_what_plan_prints(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # where nobody has downloaded the model
    with pytest.raises(SystemExit) as ending:
        main(["plan", str(EXAMPLES / name / "config.yaml")])
    assert not ending.value.code
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    readme = (EXAMPLES / name / "README.md").read_text()
    (block,) = re.findall(r"```\n(.*?)```", readme, flags=re.DOTALL)
    assert [line.strip() for line in block.splitlines()] == printed
