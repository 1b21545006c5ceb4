"""Every family's table and configuration against transformers' own classes."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_families import FAMILIES, LLAMA3, save_tiny, tiny_config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nft_megatron.base.errors import UserError
from nft_megatron.weights import FAMILIES as OURS
from nft_megatron.weights import ModelShape, hf_config, read_shape, shape_of, weight_table
from nft_megatron.weights.rotary import inverse_frequencies
from nft_megatron.weights.shape import SHAPE_EXAMPLE, Experts, Llama3Scaling
from nft_megatron.weights.table import merge, split

ONE_OF_EACH = ("qwen2", "qwen3", "qwen3_moe", "llama 3", "mistral")


def test_every_family_is_tested():
    assert {tiny_config(name).architectures[0] for name in ONE_OF_EACH} == OURS.keys()


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp("family"))


def test_the_family_in_the_docs_is_the_real_one():
    root = Path(__file__).resolve().parents[2]
    code = (root / "nft_megatron" / "weights" / "qwen3.py").read_text()
    page = (root / "docs" / "new_model_family.md").read_text()
    shown = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(shown) == 8
    assert [block for block in shown if block not in code] == []


# ---------------------------------------------------------------------------------------------------------------- tables


def test_the_table_lists_every_tensor_of_the_folder_once(folder):
    table = weight_table(read_shape(folder))
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert table.shapes == stored
    exported = [source for entry in table.entries if entry.exported for source in entry.sources]
    assert len(exported) == len(set(exported)) == len(stored)
    assert len(table.by_name) == len(table.entries)


@pytest.mark.parametrize("tensor_size", [1, 2, 4])
def test_split_gives_back_every_tensor_of_the_folder(folder, tensor_size):
    shape = read_shape(folder)
    rows = shape.padded_vocab(tensor_size)
    stored = load_file(folder / "model.safetensors")
    for entry in weight_table(shape).entries:
        sources = [stored[source] for source in entry.sources]
        shards = [merge(entry, sources, tensor_size, rank, rows) for rank in range(tensor_size)]
        for name, back in zip(entry.sources, split(entry, shards, rows), strict=True):
            assert torch.equal(back, stored[name]), name


def test_experts_are_numbered_over_the_whole_model():
    table = weight_table(shape_of(tiny_config("qwen3_moe").to_dict()))
    entry = table.by_name["decoder.layers.1.mlp.experts.local_experts.5.linear_fc1.weight"]
    assert entry.sources == tuple(f"model.layers.1.mlp.experts.5.{part}_proj.weight" for part in ("gate", "up"))
    assert [e.expert for e in table.entries if e.expert is not None] == 2 * [i for i in range(8) for _ in ("fc1", "fc2")]


# --------------------------------------------------------------------------------------------------------- configurations


def test_a_model_from_the_written_configuration_computes_the_same(folder, tmp_path):
    """config.json → shape → config.json → transformers: the same weights give the same logits."""
    config = json.loads((folder / "config.json").read_text())
    written = hf_config(shape_of(config))
    assert shape_of(written) == shape_of(config)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(written))
    model_class = next(model for _, model, _ in FAMILIES.values() if model.__name__ == config["architectures"][0])
    ids = torch.arange(100)[None]
    with torch.inference_mode():
        ours, theirs = (model_class.from_pretrained(path, dtype=torch.float32)(ids).logits for path in (tmp_path, folder))
    assert torch.equal(ours, theirs)
    assert ours.std() > 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sizes_are_those_of_the_configuration(name):
    config = tiny_config(name)
    shape = shape_of(config.to_dict())
    assert (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size, shape.vocab_size) == (2, 32, 48, 131)
    heads = (shape.num_attention_heads, shape.num_query_groups, shape.head_dim)
    assert heads == (8, config.num_key_value_heads, getattr(config, "head_dim", 32 // 8))
    assert (shape.norm_epsilon, shape.max_positions, shape.tied_embeddings) == (1e-5, 256, "tied" in name)
    assert shape.rope_theta == config.rope_parameters["rope_theta"]
    assert shape.rope_scaling == (Llama3Scaling(8.0, 1.0, 4.0, 128) if "llama 3" in name else None)
    assert shape.experts == (Experts(8, 2, 24, normalise_topk=name == "qwen3_moe") if "moe" in name else None)
    assert (shape.qkv_bias, shape.qk_norm) == ("qwen2" in name, "qwen3" in name)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_what_a_file_leaves_out_reads_as_in_transformers(name):
    """Every field alone: our reading of the file without it is our reading of all that transformers makes of it."""

    def read(config: dict[str, Any]) -> object:
        try:
            return shape_of(config)
        except UserError as error:  # Qwen's 32 key-value heads do not divide the 8 heads here; Mistral's window
            return error.field, error.value

    config_class = FAMILIES[name][0]
    whole = hf_config(shape_of(tiny_config(name).to_dict()))
    required = {"architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    for field in whole.keys() - required:
        rest = {key: value for key, value in whole.items() if key != field}
        theirs = config_class(**rest).to_dict() | {"architectures": whole["architectures"]}
        assert read(rest) == read(theirs), field
    for field in required:
        with pytest.raises(UserError, match=f"config.json: {field}"):
            shape_of({key: value for key, value in whole.items() if key != field})


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["plain", "llama3"])
def test_rotary_fields_of_transformers_4_and_5(name, scaling):
    config = {key: value for key, value in tiny_config(name).to_dict().items() if key != "rope_parameters"}
    rope = scaling or {"rope_type": "default"}
    old = {"type" if key == "rope_type" else key: value for key, value in rope.items()}
    spellings = [
        config | {"rope_theta": 7000.0, "rope_scaling": scaling},
        config | {"rope_parameters": {**rope, "rope_theta": 7000.0}},
        config | {"rope_theta": 7000.0, "rope_scaling": old},
    ]
    for spelling in spellings:
        shape = shape_of(spelling)
        assert shape.rope_theta == 7000.0
        assert shape.rope_scaling == (Llama3Scaling(8.0, 1.0, 4.0, 128) if scaling else None)


def test_frequencies_are_those_of_transformers():
    for scaling in (LLAMA3, LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}, None):
        for theta, head_dim in ((10_000.0, 8), (500_000.0, 128), (1e6, 64)):
            config = tiny_config("llama 3")
            config.rope_parameters = {"rope_type": "default", "rope_theta": theta} | (scaling or {})
            config.head_dim = head_dim
            if scaling:
                expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
            else:
                expected = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
            assert torch.equal(inverse_frequencies(shape_of(config.to_dict())), expected)


def test_scaling_changes_low_frequencies_only():
    plain = replace(SHAPE_EXAMPLE, head_dim=8, rope_theta=1e4)  # wavelengths 6, 63, 628 and 6283 tokens
    scaled = inverse_frequencies(replace(plain, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 128)))
    ratio = (inverse_frequencies(plain) / scaled).tolist()
    smooth = (128 / (2 * torch.pi / 0.1) - 1) / 3
    assert ratio == pytest.approx([1.0, 1 / ((1 - smooth) / 8 + smooth), 8.0, 8.0], rel=1e-5)


# --------------------------------------------------------------------------------------------------------------- refusals

EVERYWHERE: list[tuple[dict[str, Any], str]] = [
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_dropout": 0.1}, "attention_dropout"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "rope_parameters"),
    ({"rope_scaling": {**LLAMA3, "factor": None}}, "rope_scaling.factor"),
    ({"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, "rope_parameters.high_freq_factor"),
    ({"rope_parameters": None, "rope_theta": -1.0}, "rope_theta"),
    ({"num_hidden_layers": "many"}, "num_hidden_layers"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"head_dim": 7}, "head_dim"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
]
OWN: dict[str, list[tuple[dict[str, Any], str]]] = {
    "qwen3": [({"attention_bias": True}, "attention_bias")],
    "llama 3": [({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias")],
    "mistral": [({"sliding_window": 4096}, "sliding_window")],
    "qwen3_moe": [
        ({"attention_bias": True}, "attention_bias"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
    ],
}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_what_cannot_be_expressed_is_refused_by_name(name):
    config = tiny_config(name).to_dict()
    for changes, field in EVERYWHERE + OWN.get(name, []):
        with pytest.raises(UserError) as caught:
            shape_of({**config, **changes})
        assert caught.value.field == f"config.json: {field}"


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "longrope"])
@pytest.mark.parametrize("has_original", [True, False])
def test_the_remedy_for_a_rotary_scaling_says_what_to_do_and_works(kind, has_original):
    """As Qwen's model cards add it, and as transformers 5 writes it together with the base."""
    config = tiny_config("qwen2").to_dict() | {"rope_parameters": None, "rope_theta": 5000.0, "max_position_embeddings": 256}
    scaling = {"factor": 4.0} | ({"original_max_position_embeddings": 64} if has_original else {})
    old = config | {"rope_scaling": {"type": kind, **scaling}}
    new = config | {"rope_theta": None, "rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **scaling}}
    for changed, how in (
        (old, "remove rope_scaling from config.json, "),
        (new, 'replace rope_parameters in config.json by {"rope_type": "default", "rope_theta": 5000}, '),
    ):
        with pytest.raises(UserError) as caught:
            shape_of(changed)
        assert f"({kind}) is not supported" in caught.value.problem
        assert how in caught.value.remedy
        assert f"max_position_embeddings to at most {64 if has_original else 256}," in caught.value.remedy
    as_told = {**new, "rope_parameters": {"rope_type": "default", "rope_theta": 5000}, "max_position_embeddings": 64}
    del old["rope_scaling"]
    assert shape_of(as_told) == shape_of(old | {"max_position_embeddings": 64})


def test_mistral_without_a_word_on_its_window_has_one():
    config = tiny_config("mistral").to_dict()
    del config["sliding_window"]
    with pytest.raises(UserError, match="sliding_window = 4096"):
        shape_of(config)


@pytest.mark.parametrize("architectures", [["BloomForCausalLM"], [], None])
def test_an_unknown_architecture(architectures):
    with pytest.raises(UserError, match="no such model family") as caught:
        shape_of({"architectures": architectures})
    assert caught.value.field == "config.json: architectures"


@pytest.mark.parametrize(
    ("architecture", "changes", "field"),
    [
        ("LlamaForCausalLM", {"qkv_bias": True}, "qkv_bias"),
        ("Qwen2ForCausalLM", {"qkv_bias": False}, "qkv_bias"),
        ("MistralForCausalLM", {"qkv_bias": False, "qk_norm": True}, "qk_norm"),
        ("Qwen3ForCausalLM", {"qkv_bias": False, "qk_norm": True, "experts": Experts(8, 2, 24, True)}, "experts"),
        ("Qwen3MoeForCausalLM", {"qkv_bias": False, "qk_norm": True}, "experts"),
        ("BloomForCausalLM", {}, "architecture"),
    ],
)
def test_a_shape_that_the_family_cannot_write_is_refused_by_name(architecture, changes, field):
    shape: ModelShape = replace(SHAPE_EXAMPLE, architecture=architecture, **changes)
    with pytest.raises(UserError) as caught:
        hf_config(shape)
    assert caught.value.field == field


def test_a_missing_folder_and_a_broken_config(tmp_path: Path):
    for path, problem in ((tmp_path / "absent", "no such folder"), (tmp_path, "no config.json")):
        with pytest.raises(UserError, match=problem) as caught:
            read_shape(path)
        assert caught.value.field == "model.path"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_shape(tmp_path)
