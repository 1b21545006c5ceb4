"""A reference for tests/model/test_parity.py: Megatron-Core's own model and attention, one unpacked sequence at a time."""

import gc
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from recorded_step import members, paper_loss
from safetensors.torch import load_file, save_file
from torch.nn import functional

from nft_megatron.model.topology import init_topology, shutdown
from nft_megatron.weights import read_shape, weight_table
from nft_megatron.weights.table import merge, split

NORMS = {  # the local spec's names for what the tables call by Transformer Engine's names
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def alone_in_megatron(model_folder: Path, ledger: Path, out: Path) -> None:
    """Write the gradients of Eq. 10 for every mini-batch into ``out``, under Hugging Face names."""
    init_topology(threads=1)
    _write_gradients(model_folder, ledger, out)
    gc.collect()
    shutdown()


def _write_gradients(model_folder: Path, ledger: Path, out: Path) -> None:
    shape = read_shape(model_folder)
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        shape.vocab_size,
        shape.max_positions,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        share_embeddings_and_output_weights=shape.tied_embeddings,
    )
    entries, stored = weight_table(shape).by_name, load_file(model_folder / "model.safetensors")
    parameters = {}
    for name, parameter in model.named_parameters():
        for local, fused in NORMS.items():
            name = name.replace(local, fused)
        parameters[name] = parameter
        parameter.data = merge(entries[name], [stored[source] for source in entries[name].sources], 1, 0, shape.vocab_size)

    def logprobs_of(prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([prompt, tokens])[None]
        hidden_keys = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()[None, None]
        logits = model(ids, torch.arange(ids.shape[1])[None], hidden_keys)[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    out.mkdir()
    for i, groups in enumerate(members(step=1)):
        model.zero_grad()
        sum(paper_loss(logprobs_of, ledger, groups, "nft")).backward()
        gradients = {}
        for name, parameter in parameters.items():
            parts = split(entries[name], [parameter.grad], shape.vocab_size)
            gradients |= dict(zip(entries[name].sources, parts, strict=True))
        save_file(gradients, out / f"gradient_{i}.safetensors")
