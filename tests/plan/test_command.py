"""The command as a user runs it."""

import json
import re
from pathlib import Path

import pytest
import yaml

from nft_megatron.cli.main import main


@pytest.fixture
def plan(tmp_path: Path, make_config, capsys: pytest.CaptureFixture):
    """Runs ``nft-megatron plan`` on a file of ``make_config``'s and returns exit code, output and errors."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config().model_dump(mode="json")))

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ending:
            main(["plan", str(path), *arguments])
        captured = capsys.readouterr()
        return int(ending.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(autouse=True)
def no_hard_exit(monkeypatch: pytest.MonkeyPatch):
    """After a failure the command ends its process at once, which would be this one."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("os._exit", leave)


def test_the_engines_log_probs_save_a_pass(plan, tmp_path: Path):
    times = []
    for source in ("recompute", "engine"):
        assert plan("parallel.tensor=4", f"train.old_logprobs={source}", "--json", str(tmp_path / "plan.json"))[0] == 0
        times.append(json.loads((tmp_path / "plan.json").read_text())["training"]["time"])
    recompute, engine = times
    assert recompute.pop("old_logprobs") > 0 and engine.pop("old_logprobs") == 0
    assert recompute == engine


def test_a_run_that_fits(plan, tmp_path: Path):
    code, out, err = plan("parallel.tensor=4", "--json", str(tmp_path / "plan.json"))
    assert (code, err) == (0, "")
    tree = json.loads((tmp_path / "plan.json").read_text())
    assert tree["num_parameters"] == 7_615_616_512
    assert tree["training"]["layout"]["data"] == 2
    assert tree["fits"] is True
    stage = tree["training"]["stages"][0]
    assert stage["parameters"] == pytest.approx(2 * 7_615_616_512 / 4, rel=1e-3)
    row = next(line for line in out.splitlines() if re.match(r"\s+0\s", line)).split()
    assert float(row[1]) == pytest.approx(stage["parameters"] / 1e9, abs=0.05)
    assert float(row[-2]) == pytest.approx(stage["peak"] / 1e9, abs=0.05)
    assert tree["step_seconds"] == pytest.approx(
        tree["generation"]["seconds"]
        + tree["verify"]
        + sum(tree["publish"]["parts"].values())
        + tree["save"]
        + sum(tree["training"]["time"].values())
    )
    assert f"{tree['generation']['seconds']:,.1f}" in out


def test_layouts_are_listed_with_the_reasons_of_the_others(plan, tmp_path: Path):
    code, out, _ = plan("parallel.tensor=4", "--layouts", "--json", str(tmp_path / "plan.json"))
    assert code == 0
    tree = json.loads((tmp_path / "plan.json").read_text())
    seconds = [each["train_seconds"] for each in tree["layouts"]]
    assert seconds == sorted(seconds)
    assert "does not divide the model's 28 attention heads" in out
    fastest = tree["layouts"][0]
    assert [str(fastest[name]) for name in ("tensor", "pipeline", "virtual_pipeline", "context", "data")] == next(
        line for line in out[out.index("Layouts that fit") :].splitlines()[2:]
    ).split()[:5]


def test_a_run_that_does_not_fit_is_told_one_that_does(plan):
    code, out, err = plan("parallel.tensor=1", "rollout.max_answer_tokens=15000", "train.micro_batch_tokens=16384")
    assert code == 2
    assert "of memory" in out  # the plan itself is shown
    assert re.search(
        r"stage 0 needs \d+\.\d GB; 90% of h100 is 76.4 GB; the fastest layout that fits, with .* parallel.tensor=", err
    )
    remedy = re.search(
        r"parallel.tensor=\S+ parallel.pipeline=\S+ parallel.virtual_pipeline=\S+ parallel.context=\S+ model.\S+", err
    )
    assert remedy
    again, _, _ = plan("rollout.max_answer_tokens=15000", "train.micro_batch_tokens=16384", *remedy.group().rstrip(";").split())
    assert again == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "v100"], "--gpu = v100: unknown kind of GPU; use one of a100-80gb, h100"),
        (["--gpus", "20"], "--gpus = 20: is not a number of whole nodes of 8"),
        (["parallel.tensor=8"], "parallel.tensor = 8: does not divide the model's 28 attention heads"),
        (["parallel.tensor=3"], "does not divide the 8 training GPUs"),
        (["model.path=somewhere"], "model.path = somewhere: no such folder; put the model's config.json there"),
        (
            ["model.path=Qwen2.5-Math-7B", "data.max_prompt_tokens=600"],
            "exceeds the model's context; lower their sum to at most 4096",
        ),
        (
            [
                "model.path=Qwen2.5-72B",
                "model.recompute=full",
                "cluster.trainer_nodes=64",
                "cluster.gpus_per_node=1",
                "parallel.pipeline=16",
            ],
            "may take 4,096 tokens, and 1 h100 have room for 0 beside the weights; raise it, or use GPUs with more memory",
        ),
        (["--mixed-share", "0"], "--mixed-share = 0.0: must be in (0, 1]"),
        (
            ["--gpu", "cpu", "--check", "model.path=Qwen2.5-0.5B", "model.recompute=full", "train.micro_batch_tokens=4096"],
            "--check = cpu: builds models as for GPUs",
        ),
    ],
)
def test_mistakes_are_named_with_their_remedy(plan, arguments: list[str], message: str):
    code, _, err = plan(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_a_mixture_of_experts_is_planned(plan, tmp_path: Path):
    folder = tmp_path / "experts"
    folder.mkdir()
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "max_position_embeddings": 40960,
    }
    (folder / "config.json").write_text(json.dumps(config))
    arguments = [f"model.path={folder}", "fleet.tensor_parallel=4", "cluster.trainer_nodes=2", "model.recompute=full"]
    code, out, err = plan(*arguments, "parallel.expert=8", "parallel.tensor=2", "--json", str(tmp_path / "plan.json"))
    assert (code, err) == (0, "")
    assert "30.53 B parameters" in out  # Qwen3-30B-A3B, as published
    assert "experts over 8" in out
    assert re.search(r"expert communication +\d", out)
    tree = json.loads((tmp_path / "plan.json").read_text())
    experts = 48 * 128 * 3 * 2048 * 768
    dense = 30_532_122_624 - experts
    stage = tree["training"]["stages"][0]
    assert stage["parameters"] == pytest.approx(2 * (experts / 8 / 2 + dense / 2), rel=0.01)
    assert stage["optimizer"] == pytest.approx(12 * (experts / 16 + dense / 2 / 8), rel=0.01)  # one replica of the experts
    code, _, err = plan(*arguments, "parallel.expert=3")
    assert code == 2
    assert "parallel.expert = 3: does not divide the 16 data × context ranks" in err


def test_a_dense_model_has_no_experts_to_share(plan):
    code, _, err = plan("parallel.expert=2", "parallel.tensor=4")
    assert code == 2
    assert "parallel.expert = 2: the model has no experts" in err


def test_help_teaches(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    out = capsys.readouterr().out
    assert "Qwen2.5-32B" in out
    assert all(f"  {kind} " in out for kind in ("a100-80gb", "h100", "h200", "b200", "cpu"))
    assert max(map(len, out.splitlines())) <= 160


def test_the_real_model_is_compared_on_request(command, tmp_path: Path, make_config):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config().model_dump(mode="json")))
    outcome = command("plan", path, "--check", "parallel.tensor=2", "parallel.pipeline=2")
    assert outcome.returncode == 0, outcome.stderr
    # embedding and head 152064 × 3584 and biases and norms: every tensor rank has the norms, two a layer and the last
    norms = 2 * 3584 * (2 * 28 + 1)
    assert f"{2 * (2 * 7_615_616_512 + norms):,} bytes together" in outcome.stdout
