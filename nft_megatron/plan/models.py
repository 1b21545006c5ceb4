"""The sizes of a configuration's model: from its folder, or by name for public models.

So a run can be planned before its weights are downloaded.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nft_megatron.base.errors import UserError
from nft_megatron.weights import ModelShape, read_shape


def _qwen(
    num_layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int, epsilon: float, context: int, *, tied: bool
) -> ModelShape:
    return ModelShape(
        architecture="Qwen2ForCausalLM",
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=hidden // heads,
        vocab_size=vocab,
        norm_epsilon=epsilon,
        rope_theta=1_000_000.0,
        max_positions=context,
        tied_embeddings=tied,
        qkv_bias=True,
    )


_QWEN25 = {
    "Qwen2.5-0.5B": _qwen(24, 896, 4864, 14, 2, 151936, 1e-6, 32768, tied=True),
    "Qwen2.5-1.5B": _qwen(28, 1536, 8960, 12, 2, 151936, 1e-6, 131072, tied=True),
    "Qwen2.5-3B": _qwen(36, 2048, 11008, 16, 2, 151936, 1e-6, 32768, tied=True),
    "Qwen2.5-7B": _qwen(28, 3584, 18944, 28, 4, 152064, 1e-6, 131072, tied=False),
    "Qwen2.5-14B": _qwen(48, 5120, 13824, 40, 8, 152064, 1e-5, 131072, tied=False),
    "Qwen2.5-32B": _qwen(64, 5120, 27648, 40, 8, 152064, 1e-5, 131072, tied=False),
    "Qwen2.5-72B": _qwen(80, 8192, 29568, 64, 8, 152064, 1e-5, 131072, tied=False),
}
PUBLIC_MODELS = _QWEN25 | {
    f"Qwen2.5-Math-{size}": replace(_QWEN25[f"Qwen2.5-{size}"], rope_theta=10_000.0, max_positions=4096)
    for size in ("1.5B", "7B")
}
"""From their ``config.json`` on https://huggingface.co/Qwen."""


def find_shape(path: Path) -> tuple[ModelShape, str]:
    """The sizes of the model at ``path``, and their origin in words.

    A folder needs only its ``config.json``. Without a folder, the last part of the path may name a public model.

    Raises:
        UserError: naming ``model.path`` if there is neither.

    >>> find_shape(Path("not/downloaded/Qwen2.5-32B"))[0].num_layers
    64
    """
    if path.is_dir():
        return read_shape(path), f"{path}/config.json"
    if path.name in PUBLIC_MODELS:
        return PUBLIC_MODELS[path.name], f"the public sizes of {path.name}; {path} is not downloaded yet"
    raise UserError(
        "model.path",
        path,
        "no such folder",
        f"put the model's config.json there (no weights are needed), or plan one of {', '.join(PUBLIC_MODELS)} by its name",
    )
