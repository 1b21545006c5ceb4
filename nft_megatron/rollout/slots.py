"""The key-value cache of a batch of answers, and attention over it, plugged into any transformers model.

transformers lets a serving backend replace the attention function (``AttentionInterface``). It passes an unknown function the
keyword arguments of the model call, but neither mask nor cache. Here the argument is ``attention_state``: a
:class:`PromptState` while prompts are read, a :class:`SlotState` while answers are decoded. Projections, rotary embeddings and
norms remain the model's own.

Shapes: L layers, B answers (P prompts), H key-value heads, G query heads per key-value head, C capacity in tokens, T ≤ C tokens
in use, D head size.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from nft_megatron.base.errors import UserError

ATTENTION_NAME = "nft_megatron_slots"
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")


class AttentionState(Protocol):
    """Stores the keys and values of one model call and attends over them."""

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention output ``[B, H·G, tokens, D]`` for a query of that shape, key and value ``[B, H, tokens, D]``."""


class PromptState:
    """Reads right-padded prompts that all start at position 0, so a causal mask is all they need.

    Padding that ends up in the cache is hidden by each answer's length and overwritten by its tokens.
    """

    def __init__(self, num_layers: int) -> None:
        self._layers: list[torch.Tensor] = [torch.empty(0)] * num_layers

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        self._layers[layer] = torch.stack((key, value))
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)

    def key_values(self) -> torch.Tensor:
        """``[2, L, P, H, T, D]``: keys and values of every layer."""
        return torch.stack(self._layers, dim=1)


class SlotState:
    """A cache with one row per answer, the first rows in use; its capacity grows with the longest answer.

    Memory is zeroed because even a masked score multiplies its value, and 0 · NaN is NaN.
    """

    def __init__(self, num_layers: int, num_slots: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self._kv_2LBHCD = torch.zeros(2, num_layers, num_slots, num_heads, 0, head_dim, dtype=dtype)
        self._rows_N = torch.arange(num_slots * num_heads)

    @torch.inference_mode()
    def fill(self, rows: slice, key_values: torch.Tensor, sources: torch.Tensor) -> None:
        """Start the answers in ``rows`` from the prompts ``sources`` of :meth:`PromptState.key_values`."""
        num_tokens = key_values.shape[4]
        self._reserve(num_tokens)
        self._kv_2LBHCD[:, :, rows, :, :num_tokens] = key_values[:, :, sources]

    @torch.inference_mode()
    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy whole rows; ``sources`` and ``targets`` are disjoint."""
        self._kv_2LBHCD[:, :, targets] = self._kv_2LBHCD[:, :, sources]

    @torch.inference_mode()
    def prepare(self, positions_B: torch.Tensor, num_tokens: int) -> None:
        """Call before each decoding step. Answer b's new token is at ``positions_B[b]``; attention spans ``num_tokens`` (T)."""
        self._reserve(num_tokens)
        num_heads, capacity = self._kv_2LBHCD.shape[3:5]
        positions_N = positions_B.repeat_interleave(num_heads)
        self._write_N = self._rows_N[: len(positions_N)] * capacity + positions_N
        hidden_NT = torch.arange(num_tokens) > positions_N[:, None]
        self._bias_N1T = torch.zeros(hidden_NT.shape, dtype=self._kv_2LBHCD.dtype).masked_fill_(hidden_NT, -torch.inf)[:, None]

    def _reserve(self, num_tokens: int) -> None:
        """Ensure a capacity of ``num_tokens``, growing by at least half so that copying stays a small share of the work."""
        *outer, capacity, head_dim = self._kv_2LBHCD.shape
        if num_tokens > capacity:
            grown_2LBHCD = self._kv_2LBHCD.new_zeros(*outer, max(num_tokens, capacity + capacity // 2), head_dim)
            grown_2LBHCD[..., :capacity, :] = self._kv_2LBHCD
            self._kv_2LBHCD = grown_2LBHCD

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        keys_BHCD, values_BHCD = self._kv_2LBHCD[:, layer]
        capacity, head_dim = keys_BHCD.shape[2:]
        keys_BHCD.view(-1, head_dim).index_copy_(0, self._write_N, key.reshape(-1, head_dim))
        values_BHCD.view(-1, head_dim).index_copy_(0, self._write_N, value.reshape(-1, head_dim))
        # The flat cache has N = B·H rows. The G query heads of a key-value head are the rows of one small matrix product: keys
        # are not repeated (as in transformers' repeat_kv), and on a CPU this is faster than torch 2.13's fused kernel.
        num_rows, _, num_tokens = self._bias_N1T.shape
        keys_NTD = keys_BHCD.view(-1, capacity, head_dim)[:num_rows, :num_tokens]
        values_NTD = values_BHCD.view(-1, capacity, head_dim)[:num_rows, :num_tokens]
        query_NGD = query.reshape(num_rows, -1, head_dim)
        scores_NGT = torch.baddbmm(self._bias_N1T, query_NGD, keys_NTD.transpose(1, 2), alpha=scale)
        return torch.bmm(torch.softmax(scores_NGT, dim=-1), values_NTD).view(query.shape)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    attention_state: AttentionState,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    for name in _UNSUPPORTED:
        if settings.get(name) is not None:
            raise UserError("model", type(module).__name__, f"the embedded engine has no attention with {name}", "use vLLM")
    output = attention_state.attend(int(module.layer_idx), query, key, value, scaling)  # type: ignore[arg-type]
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, _attention)
