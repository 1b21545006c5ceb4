"""A mixture of experts from a question to a better model, with its experts spread over ranks."""

from pathlib import Path

import pytest
import torch
from conftest import BOXES, WORDS, make_tokenizer
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A random Qwen3-MoE of 2 layers with 8 experts, of which each token takes 2."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
    )
    model = Qwen3MoeForCausalLM(config)
    model.generation_config.eos_token_id = [1, *map(WORDS.index, BOXES)]
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def test_spread_experts_train_like_one_process(run_config, command, metrics_of, tmp_path):
    sections = {"train": {"num_steps": 2}}
    assert command("train", run_config("one", **sections)).returncode == 0
    several = run_config("several", **sections, parallel={"expert": 2, "tensor": 2})
    done = command("train", several, ranks=4)
    assert done.returncode == 0, done.stderr
    for one, other in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "several"), strict=True):
        assert one["mismatch_max"] < 1e-4, "the engine is transformers' own model"
        assert other["trained_tokens"] == one["trained_tokens"]
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    files = [load_file(tmp_path / name / "hf" / "step_000002" / "model.safetensors") for name in ("one", "several")]
    assert files[0].keys() == files[1].keys()
    assert any(".experts.7." in name for name in files[0])
    for name in files[0]:
        torch.testing.assert_close(files[0][name], files[1][name], rtol=0, atol=1e-4)


def test_ranks_that_cannot_share_experts(run_config, command, tmp_path):
    done = command("train", run_config(parallel={"expert": 3}), ranks=2)
    assert done.returncode == 2
    assert "parallel.expert = 3: does not divide the 2 data × context ranks" in done.stderr
