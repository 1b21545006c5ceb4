"""The weight table of a pre-norm decoder: RMSNorm, grouped-query attention, rotary positions, SwiGLU; dense or with experts.

Qwen, Llama and Mistral all have this form. They differ in switches of the shape: ``qkv_bias``, ``qk_norm``, ``experts``.
"""

from __future__ import annotations

from collections.abc import Iterator

from nft_megatron.weights.shape import ModelShape
from nft_megatron.weights.table import Entry, Layout, WeightTable


def decoder_table(shape: ModelShape) -> WeightTable:
    """Every parameter, in Hugging Face's order: embedding, layers, final norm, LM head."""
    vocab = (shape.vocab_size, shape.hidden_size)
    embedding = "model.embed_tokens.weight"
    head = embedding if shape.tied_embeddings else "lm_head.weight"
    return WeightTable(
        entries=(
            Entry("embedding.word_embeddings.weight", (embedding,), (vocab,), Layout.VOCABULARY),
            *(entry for number in range(shape.num_layers) for entry in _layer(shape, number)),
            _norm("decoder.final_layernorm.weight", "model.norm.weight", shape.hidden_size),
            # A tied head exists as a parameter of its own only on the last of several pipeline stages.
            Entry("output_layer.weight", (head,), (vocab,), Layout.VOCABULARY, exported=not shape.tied_embeddings),
        ),
        copies={"lm_head.weight": embedding} if shape.tied_embeddings else {},
    )


_FUSED_NAMES = (
    (".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"),
    (".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"),
)


def fused_name(name: str, has_experts: bool) -> str:
    """The table's name for a parameter of Megatron's local spec; the table's own names are returned unchanged.

    In the local spec norms are separate modules; Transformer Engine fuses them into the linear layer that follows, the second
    one only before an MLP, not before a router. Tables use the fused names, as Megatron's checkpoints do
    (models/gpt/gpt_layer_specs.py, sharded_state_dict_keys_map).

    >>> fused_name("decoder.layers.1.pre_mlp_layernorm.weight", has_experts=False)
    'decoder.layers.1.mlp.linear_fc1.layer_norm_weight'
    """
    for local, fused in _FUSED_NAMES[: 1 if has_experts else 2]:
        name = name.replace(local, fused)
    return name


def _layer(shape: ModelShape, number: int) -> Iterator[Entry]:
    ours, theirs = f"decoder.layers.{number}.", f"model.layers.{number}."
    yield from _attention(shape, f"{ours}self_attention.", f"{theirs}self_attn.")
    if shape.experts is None:
        yield from _gated_mlp(f"{ours}mlp.", f"{theirs}mlp.", shape.hidden_size, shape.ffn_hidden_size)
    else:
        router = (shape.experts.num_experts, shape.hidden_size)
        yield Entry(f"{ours}mlp.router.weight", (f"{theirs}mlp.gate.weight",), (router,), Layout.WHOLE)
        for expert in range(shape.experts.num_experts):
            yield from _gated_mlp(
                f"{ours}mlp.experts.local_experts.{expert}.",
                f"{theirs}mlp.experts.{expert}.",
                shape.hidden_size,
                shape.experts.ffn_hidden_size,
                expert,
            )
    # Megatron fuses a norm into the linear layer that follows; before a router there is none to fuse it into.
    mlp_norm = "mlp.linear_fc1.layer_norm_weight" if shape.experts is None else "pre_mlp_layernorm.weight"
    yield _norm(f"{ours}self_attention.linear_qkv.layer_norm_weight", f"{theirs}input_layernorm.weight", shape.hidden_size)
    yield _norm(f"{ours}{mlp_norm}", f"{theirs}post_attention_layernorm.weight", shape.hidden_size)


def _attention(shape: ModelShape, ours: str, theirs: str) -> Iterator[Entry]:
    hidden, groups = shape.hidden_size, shape.num_query_groups
    q, kv = shape.num_attention_heads * shape.head_dim, groups * shape.head_dim
    weights = tuple(f"{theirs}{part}_proj.weight" for part in "qkv")
    yield Entry(f"{ours}linear_qkv.weight", weights, ((q, hidden), (kv, hidden), (kv, hidden)), Layout.QKV, num_groups=groups)
    if shape.qkv_bias:
        biases = tuple(f"{theirs}{part}_proj.bias" for part in "qkv")
        yield Entry(f"{ours}linear_qkv.bias", biases, ((q,), (kv,), (kv,)), Layout.QKV, num_groups=groups)
    yield Entry(f"{ours}linear_proj.weight", (f"{theirs}o_proj.weight",), ((hidden, q),), Layout.SPLIT, axis=1)
    if shape.qk_norm:
        yield _norm(f"{ours}q_layernorm.weight", f"{theirs}q_norm.weight", shape.head_dim)
        yield _norm(f"{ours}k_layernorm.weight", f"{theirs}k_norm.weight", shape.head_dim)


def _gated_mlp(ours: str, theirs: str, hidden: int, ffn: int, expert: int | None = None) -> Iterator[Entry]:
    gate_up = (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight")
    yield Entry(f"{ours}linear_fc1.weight", gate_up, ((ffn, hidden), (ffn, hidden)), Layout.SPLIT, expert=expert)
    down = f"{theirs}down_proj.weight"
    yield Entry(f"{ours}linear_fc2.weight", (down,), ((hidden, ffn),), Layout.SPLIT, axis=1, expert=expert)


def _norm(ours: str, theirs: str, size: int) -> Entry:
    return Entry(ours, (theirs,), ((size,),), Layout.WHOLE)
