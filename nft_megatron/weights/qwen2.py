"""Qwen2 and Qwen2.5: the reader of their ``config.json`` and their weight table.

RMSNorm before attention and MLP, grouped-query attention with a bias on q, k and v only, rotary positions, SwiGLU, LM head tied
to the embedding in the small sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nft_megatron.errors import UserError
from nft_megatron.weights.shape import ModelShape, positive_int
from nft_megatron.weights.table import Entry, Layout, WeightTable

ARCHITECTURE = "Qwen2ForCausalLM"


def _refuse(field: str, value: object, problem: str) -> UserError:
    return UserError(f"config.json: {field}", value, problem, "use a model that this family's table can express")


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies: transformers 4 writes ``rope_theta``, transformers 5 ``rope_parameters``."""
    parameters = config.get("rope_parameters") or {}
    for field, scaling in (("rope_parameters", parameters), ("rope_scaling", config.get("rope_scaling") or {})):
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise _refuse(field, scaling, f"scaled rotary positions ({kind}) are not supported")
    return float(parameters.get("rope_theta", config.get("rope_theta", 10_000.0)))


def _uses_sliding_window(config: Mapping[str, Any]) -> bool:
    layer_types = config.get("layer_types") or ()
    return bool(config.get("use_sliding_window")) or any(kind != "full_attention" for kind in layer_types)


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a parsed ``config.json``.

    Raises:
        UserError: for a missing or malformed field, and for what this family's table cannot express.
    """
    if _uses_sliding_window(config):
        raise _refuse("use_sliding_window", config.get("use_sliding_window"), "sliding-window attention is not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise _refuse("hidden_act", config["hidden_act"], "only silu (SwiGLU) is supported")
    if config.get("attention_dropout", 0.0):
        raise _refuse("attention_dropout", config["attention_dropout"], "dropout would make the policy's log-probs random")
    num_heads = positive_int(config, "num_attention_heads")
    num_groups = positive_int(config, "num_key_value_heads", num_heads)
    hidden_size = positive_int(config, "hidden_size")
    if num_heads % num_groups:
        raise _refuse("num_key_value_heads", num_groups, f"does not divide num_attention_heads = {num_heads}")
    return ModelShape(
        architecture=ARCHITECTURE,
        num_layers=positive_int(config, "num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=positive_int(config, "intermediate_size"),
        num_attention_heads=num_heads,
        num_query_groups=num_groups,
        head_dim=positive_int(config, "head_dim", hidden_size // num_heads),
        vocab_size=positive_int(config, "vocab_size"),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=_rope_theta(config),
        max_positions=positive_int(config, "max_position_embeddings", 32768),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=True,
    )


def table(shape: ModelShape) -> WeightTable:
    """Every parameter, in Hugging Face's order: embedding, layers, final norm, LM head."""
    hidden, ffn, dim = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim
    q, kv = shape.num_attention_heads * dim, shape.num_query_groups * dim
    vocab = (shape.vocab_size, hidden)
    embedding = "model.embed_tokens.weight"

    def layer(number: int) -> list[Entry]:
        ours, theirs = f"decoder.layers.{number}.", f"model.layers.{number}."
        qkv_weights = tuple(f"{theirs}self_attn.{part}_proj.weight" for part in "qkv")
        qkv_biases = tuple(f"{theirs}self_attn.{part}_proj.bias" for part in "qkv")
        gate_up = tuple(f"{theirs}mlp.{part}_proj.weight" for part in ("gate", "up"))
        return [
            Entry(
                f"{ours}self_attention.linear_qkv.weight",
                qkv_weights,
                ((q, hidden), (kv, hidden), (kv, hidden)),
                Layout.QKV,
                num_groups=shape.num_query_groups,
            ),
            Entry(
                f"{ours}self_attention.linear_qkv.bias",
                qkv_biases,
                ((q,), (kv,), (kv,)),
                Layout.QKV,
                num_groups=shape.num_query_groups,
            ),
            Entry(
                f"{ours}self_attention.linear_proj.weight",
                (f"{theirs}self_attn.o_proj.weight",),
                ((hidden, q),),
                Layout.SPLIT,
                axis=1,
            ),
            Entry(f"{ours}mlp.linear_fc1.weight", gate_up, ((ffn, hidden), (ffn, hidden)), Layout.SPLIT),
            Entry(f"{ours}mlp.linear_fc2.weight", (f"{theirs}mlp.down_proj.weight",), ((hidden, ffn),), Layout.SPLIT, axis=1),
            Entry(
                f"{ours}self_attention.linear_qkv.layer_norm_weight",
                (f"{theirs}input_layernorm.weight",),
                ((hidden,),),
                Layout.WHOLE,
            ),
            Entry(
                f"{ours}mlp.linear_fc1.layer_norm_weight",
                (f"{theirs}post_attention_layernorm.weight",),
                ((hidden,),),
                Layout.WHOLE,
            ),
        ]

    head = embedding if shape.tied_embeddings else "lm_head.weight"
    return WeightTable(
        entries=(
            Entry("embedding.word_embeddings.weight", (embedding,), (vocab,), Layout.VOCABULARY),
            *(entry for number in range(shape.num_layers) for entry in layer(number)),
            Entry("decoder.final_layernorm.weight", ("model.norm.weight",), ((hidden,),), Layout.WHOLE),
            # A tied head exists as a parameter of its own only on the last of several pipeline stages.
            Entry("output_layer.weight", (head,), (vocab,), Layout.VOCABULARY, exported=not shape.tied_embeddings),
        ),
        ignored=frozenset({"lm_head.weight"} if shape.tied_embeddings else ()),
    )
