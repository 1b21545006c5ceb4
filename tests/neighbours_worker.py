"""What the processes of tests/convert/test_neighbours.py run: Megatron-Core alone, as its other users call it."""

import gc
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig

from nft_megatron.config.yaml import parse_yaml
from nft_megatron.model.topology import init_topology, shutdown

NUM_TOKENS = 40


def load_and_save(checkpoints: dict[str, Path], recipe: str, saves: dict[str, dict[str, Any]], out: Path) -> dict[str, list]:
    """Build a model from each checkpoint's ``run_config.yaml`` alone, load it by ``recipe``, and return its logits.

    Each is saved again to ``out/<its name>/<form>``; ``saves`` has the arguments of ``sharded_state_dict`` by form.
    Token i is (7 i + 3) mod 131.
    """
    init_topology(threads=1)
    tokens = (7 * torch.arange(NUM_TOKENS) + 3) % 131
    hidden_keys = torch.ones(NUM_TOKENS, NUM_TOKENS).triu(1).bool()[None, None]
    logits = {}
    for name, converted in checkpoints.items():
        model = build(parse_yaml((converted / "run_config.yaml").read_text())["model"]).eval()
        exec(recipe, {"model": model, "DST": str(converted)})
        with torch.no_grad():
            logits[name] = model(tokens[None], torch.arange(NUM_TOKENS)[None], hidden_keys)[0].tolist()
        for form, arguments in saves.items():
            (out / name / form).mkdir(parents=True)
            dist_checkpointing.save({"model": model.sharded_state_dict(**arguments)}, str(out / name / form))
        del model
    gc.collect()
    shutdown()
    return logits


def build(model: dict[str, Any]) -> GPTModel:
    """What Megatron-Bridge's provider builds, with Megatron's local layers in place of Transformer Engine's."""
    assert model.pop("_target_") == "megatron.bridge.models.gpt_provider.GPTModelProvider"
    assert model.pop("should_pad_vocab") is False
    settings = {name: _instantiate(value) for name, value in model.items()}
    of_config = {field.name for field in fields(TransformerConfig)}
    on_cpu = {"use_cpu_initialization": True, "gradient_accumulation_fusion": False, "bias_activation_fusion": False}
    config = TransformerConfig(
        **{name: value for name, value in settings.items() if name in of_config} | on_cpu | {"moe_grouped_gemm": False}
    )
    layers = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    if config.num_moe_experts is not None:  # the local spec names a norm before a router as if it were fused
        del layers.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    others = {name: value for name, value in settings.items() if name not in of_config}
    return GPTModel(config, layers, max_sequence_length=others.pop("seq_length"), **others)


def _instantiate(value: Any) -> Any:
    """What Megatron-Bridge makes of a value (utils/instantiate_utils.py): a node with ``_call_: false`` is an object's name."""
    if not isinstance(value, dict):
        return value
    assert set(value) == {"_target_", "_call_"} and value["_call_"] is False
    found: Any = torch
    for part in value["_target_"].split(".")[1:]:
        found = getattr(found, part)
    return found
