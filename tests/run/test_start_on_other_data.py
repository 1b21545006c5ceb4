"""A start on data and a tokenizer of other kinds: GSM8K's layout in two configs, a template with an argument and the time."""

import json
from pathlib import Path

import pytest
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %} ({{ strftime_now('%d %b %Y %H:%M:%S') }})<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
)
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<think>", "</think>")
HENS = "Mia has {0} hens. Each lays {1} eggs. How many eggs is that?"
SOLVED = "Each hen lays {1}, so all lay {0}*{1}=<<{0}*{1}={2}>>{2} eggs.\n#### {2}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Qwen2 that reads bytes."""
    folder = tmp_path / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    of_bytes = Tokenizer(BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    of_bytes.decoder = decoders.ByteLevel()
    of_bytes.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    PreTrainedTokenizerFast(tokenizer_object=of_bytes, eos_token=SPECIAL[0], chat_template=TEMPLATE).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    end = len(alphabet)
    config = Qwen2Config(
        vocab_size=end + len(SPECIAL),
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=0,
        **sizes,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Path:
    for name in ("main", "socratic"):
        (tmp_path / "sums" / name).mkdir(parents=True)
        rows = [(hens, eggs, hens * eggs) for hens in range(2, 8) for eggs in (3, 4)]
        lines = (json.dumps({"question": HENS.format(*row), "answer": SOLVED.format(*row)}) + "\n" for row in rows)
        (tmp_path / "sums" / name / "train.jsonl").write_text("".join(lines))
    tree = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": str(tmp_path / "sums"), "max_prompt_tokens": 100},
        "rollout": {"questions_per_step": 2, "group_size": 2, "max_answer_tokens": 4, "processes": 0},
        "algorithm": {"name": "grpo"},  # trains on questions of any kind: a random model gets none right
        "train": {"num_steps": 1, "updates_per_step": 1, "micro_batch_tokens": 256},
        "parallel": {"threads": 1, "timeout_seconds": 60.0},
        "observe": {"tensorboard": False},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_start_on_gsm8k_layout_with_two_configs_and_thinking_switched_off(config, command, tmp_path):
    refused = command("train", config)
    assert refused.returncode == 2
    assert "has several configs, whose questions may overlap: main, socratic; choose one: data.config_name=" in refused.stderr
    assert not (tmp_path / "run" / "prompts.parquet").exists()
    chosen = ("data.config_name=main", "data.chat_template_kwargs.enable_thinking=false")
    first = command("train", config, *chosen)
    assert first.returncode == 0, first.stderr
    table = [line for line in first.stderr.splitlines() if line.startswith("  ")]
    assert table[0].split() == ["rows", "read", "12"] and table[1].split() == ["questions", "asked", "12"]
    examples = [line.removeprefix("    | ") for line in table if line.startswith("    | ")]
    assert len(examples) == 3 and examples[0].startswith(f"<|user|>{HENS.format(2, 3)} (")
    assert all(line.endswith(")<|assistant|><think></think>") for line in examples)
    assert any(line.endswith("gold '6'):") for line in table) and any(line.endswith("gold '28'):") for line in table)
    # At another second the template prints another time; the run keeps the first
    again = command("train", config, *chosen, "train.num_steps=2")
    assert again.returncode == 0, again.stderr
    assert [line.removeprefix("    | ") for line in again.stderr.splitlines() if line.startswith("    | ")] == examples
    other = command("train", config, chosen[0], "train.num_steps=3")
    assert other.returncode == 2
    assert "data.chat_template_kwargs.enable_thinking = None: the run in " in other.stderr
