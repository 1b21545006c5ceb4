import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from nft_megatron.errors import UserError
from nft_megatron.weights import read_shape, weight_table

SMALL = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
}


def write(folder: Path, **changes: object) -> Path:
    config = {key: value for key, value in {**SMALL, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_lists_the_tensors_of_transformers(tmp_path: Path, tied: bool):
    torch.manual_seed(0)
    config = Qwen2Config(**{**SMALL, "tie_word_embeddings": tied})
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(tmp_path)
    table = weight_table(read_shape(tmp_path))
    assert dict(table.shapes) == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert table.ignored == ({"lm_head.weight"} if tied else set())


def test_the_sizes_of_a_config(tmp_path: Path):
    shape = read_shape(write(tmp_path))
    assert (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size, shape.vocab_size) == (2, 32, 48, 131)
    assert (shape.num_attention_heads, shape.num_query_groups, shape.head_dim) == (4, 2, 8)
    assert (shape.norm_epsilon, shape.max_positions, shape.tied_embeddings, shape.qkv_bias) == (1e-5, 64, False, True)


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({}, 5000.0),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7000.0}}, 7000.0),
        ({"rope_theta": None}, 10000.0),
        ({"rope_scaling": {"type": "default"}}, 5000.0),
    ],
    ids=["transformers 4", "transformers 5", "default", "no scaling"],
)
def test_rope_theta(tmp_path: Path, changes: dict[str, object], theta: float):
    assert read_shape(write(tmp_path, **changes)).rope_theta == theta


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"architectures": ["BloomForCausalLM"]}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_parameters"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path: Path, changes: dict[str, object], field: str):
    with pytest.raises(UserError) as caught:
        read_shape(write(tmp_path, **changes))
    assert field in caught.value.field


def test_a_missing_folder_and_a_broken_config(tmp_path: Path):
    for folder, problem in ((tmp_path / "absent", "no such folder"), (tmp_path, "no config.json")):
        with pytest.raises(UserError, match=problem) as caught:
            read_shape(folder)
        assert caught.value.field == "model.path"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_shape(tmp_path)
