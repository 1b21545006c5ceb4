"""``config.json`` ↔ :class:`ModelShape`: the fields that all decoder families share, and refusals of what they cannot express.

A family's file gives its fields' defaults and its own features; see docs/new_model_family.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nft_megatron.base.errors import UserError
from nft_megatron.weights.shape import Experts, Llama3Scaling, ModelShape

Config = Mapping[str, Any]

_COMPLETE = "check that the model folder is complete"
_MOST = 2**31 - 1
_MOST_LAYERS = 10_000
_MOST_EXPERTS = 100_000
"""Of all layers together. Tables have an entry for each."""
_SHARED_REFUSALS = {
    "hidden_act": ("silu", "only silu (SwiGLU) is supported"),
    "use_sliding_window": (False, "sliding-window attention is not supported"),
    "attention_dropout": (0.0, "dropout would make the policy's log-probs random"),
    "partial_rotary_factor": (1.0, "rotary positions on only part of each head are not supported"),
    "attn_logit_softcapping": (None, "capped attention logits are not supported"),
    "final_logit_softcapping": (None, "capped logits are not supported"),
    "quantization_config": (None, "quantised weights cannot be trained"),
}


def refusal(
    field: str, value: object, problem: str, remedy: str = "use a model that this family's table can express"
) -> UserError:
    """The error for a ``config.json`` whose ``field`` needs what the family's table cannot express."""
    return UserError(f"config.json: {field}", value, problem, remedy)


def only(config: Config, field: str, allowed: object, problem: str) -> None:
    """Refuse every value of ``field`` except ``allowed``, absent or null.

    >>> only({"mlp_bias": True}, "mlp_bias", False, "biases are not supported")
    Traceback (most recent call last):
    nft_megatron.base.errors.UserError: config.json: mlp_bias = True: biases are not supported; use a model that this ...
    """
    value = config.get(field)
    if value is not None and value != allowed:
        raise refusal(field, value, problem)


def positive_int(config: Config, field: str, default: int | None = None) -> int:
    """A whole number above 0 and below 2^31; ``default`` if absent or null.

    Raises:
        UserError: naming the field if it is anything else, or absent without a default.
    """
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
        raise UserError(f"config.json: {field}", value, "must be a whole number above 0 and below 2^31", _COMPLETE)
    return value


def flag(config: Config, field: str) -> bool:
    """True or false; false if absent or null.

    Raises:
        UserError: naming the field if it is anything else.
    """
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"config.json: {field}", value, "must be true or false", _COMPLETE)
    return bool(value)


def positive_float(config: Config, field: str, default: float | None = None) -> float:
    """A number > 0; as :func:`positive_int`."""
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise UserError(f"config.json: {field}", value, "must be a number above 0", _COMPLETE)
    return float(value)


def read_decoder(
    config: Config, architecture: str, *, qkv_bias: bool = False, qk_norm: bool = False, experts: Experts | None = None
) -> ModelShape:
    """The shape of a decoder: the fields that all families share, and the features that each family sets.

    Raises:
        UserError: naming the field that is missing, malformed or cannot be expressed.
    """
    for field, (allowed, problem) in _SHARED_REFUSALS.items():
        only(config, field, allowed, problem)
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise refusal("layer_types", kinds, "only full attention is supported, not a sliding window")
    num_heads = positive_int(config, "num_attention_heads")
    num_groups = positive_int(config, "num_key_value_heads", num_heads)
    hidden_size = positive_int(config, "hidden_size")
    if num_heads % num_groups:
        raise refusal("num_key_value_heads", num_groups, f"does not divide num_attention_heads = {num_heads}")
    head_dim = positive_int(config, "head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise refusal("head_dim", head_dim, "must be even, because rotary positions rotate pairs")
    num_layers = positive_int(config, "num_hidden_layers")
    if num_layers > _MOST_LAYERS or (experts is not None and num_layers * experts.num_experts > _MOST_EXPERTS):
        raise refusal("num_hidden_layers", num_layers, "more layers or experts than any model has")
    rope_theta, rope_scaling = _read_rope(config)
    return ModelShape(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=positive_int(config, "intermediate_size"),
        num_attention_heads=num_heads,
        num_query_groups=num_groups,
        head_dim=head_dim,
        vocab_size=positive_int(config, "vocab_size"),
        norm_epsilon=positive_float(config, "rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        max_positions=positive_int(config, "max_position_embeddings"),
        tied_embeddings=flag(config, "tie_word_embeddings"),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        rope_scaling=rope_scaling,
        experts=experts,
    )


def _read_rope(config: Config) -> tuple[float, Llama3Scaling | None]:
    """Base and scaling. transformers 4 has ``rope_theta`` and ``rope_scaling``, transformers 5 both in ``rope_parameters``."""
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"  # in transformers 5's order
    rope = config.get(field) or {}
    if not isinstance(rope, dict):
        raise refusal(field, rope, "must be an object")
    theta = positive_float({"rope_theta": config.get("rope_theta"), **rope}, "rope_theta", 10_000.0)
    only(rope, "partial_rotary_factor", *_SHARED_REFUSALS["partial_rotary_factor"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        problem = f"this scaling of rotary positions ({kind}) is not supported"
        raise refusal(field, rope, problem, _without_scaling(field, config, theta))
    numbers = {f"{field}.{name}": value for name, value in rope.items()}
    scaling = Llama3Scaling(
        factor=positive_float(numbers, f"{field}.factor"),
        low_freq_factor=positive_float(numbers, f"{field}.low_freq_factor"),
        high_freq_factor=positive_float(numbers, f"{field}.high_freq_factor"),
        original_max_positions=positive_int(numbers, f"{field}.original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise refusal(f"{field}.high_freq_factor", scaling.high_freq_factor, "must be above low_freq_factor")
    return theta, scaling


def _without_scaling(field: str, config: Config, theta: float) -> str:
    """What to do about a scaling that is not supported: models such as Qwen2.5 and Qwen3 are trained without theirs."""
    rope = config[field]
    longest = rope.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    kept = f'{{"rope_type": "default", "rope_theta": {theta:.12g}}}'
    how = f"replace {field} in config.json by {kept}" if "rope_theta" in rope else f"remove {field} from config.json"
    return (
        f"if it was added to a trained model to extend its context, as Qwen's model cards suggest, {how}, set "
        f"max_position_embeddings to at most {longest}, and keep data.max_prompt_tokens + rollout.max_answer_tokens below "
        "that; a model that was trained with it cannot be used"
    )


def decoder_config(shape: ModelShape, model_type: str) -> dict[str, Any]:
    """The ``config.json`` of a decoder: the shared fields, in the spelling that transformers 4 and 5 and vLLM all read.

    Ids of special tokens are null: they belong to the tokenizer.
    """
    scaling = shape.rope_scaling
    return {
        "architectures": [shape.architecture],
        "model_type": model_type,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None
        if scaling is None
        else {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        },
        "tie_word_embeddings": shape.tied_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
