"""A transformers model that reads prompts and decodes one token per call, with the cache of ``slots.py``.

Any causal language model of transformers works if its attention can be replaced and has no sliding window. Only
``config.json`` is read from the folder; weights arrive through :meth:`CausalModel.load`.

Shapes: P prompts, B answers, S tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nft_megatron.base.errors import UserError
from nft_megatron.rollout.slots import ATTENTION_NAME, PromptState, SlotState
from nft_megatron.weights.fingerprint import combine_digests, tensor_digest
from nft_megatron.weights.readable_config import readable_config


class CausalModel:
    """The model in ``folder``, in ``dtype`` on the CPU. Its weights are arbitrary until :meth:`load` returns."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        try:
            config = readable_config(folder) or AutoConfig.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # transformers raises many kinds
            problem = f"transformers cannot read its config.json: {(str(error).splitlines() or [type(error).__name__])[0]}"
            raise UserError("model.path", folder, problem, "check config.json, above all its model_type") from error
        if any("sliding" in kind for kind in getattr(config, "layer_types", None) or ()):
            raise UserError("model", folder, "the embedded engine has no sliding-window attention", "use the vLLM engine")
        self._model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)
        self._model.eval().requires_grad_(False)
        self._config, self._dtype = config, dtype
        self.vocab_size: int = config.vocab_size

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
        """Copy the stream into the model, cast to its dtype, and return the fingerprint of what arrived.

        Raises ``UserError`` if a name is missing, unexpected or repeated, or a shape differs; the weights are then a mixture.
        """
        # named_parameters() yields a tied weight once, under its first name, as Hugging Face's files do.
        wanted = {name: part for item in self._model.named_parameters() for name, part in _as_in_files(*item)}
        digests = []
        for name, tensor in tensors:
            target = wanted.pop(name, None)
            if target is None:
                raise UserError("weights", name, "this tensor is repeated or not in the model", _REMEDY)
            if target.shape != tensor.shape:
                raise UserError("weights", name, f"has shape {tuple(tensor.shape)}, not {tuple(target.shape)}", _REMEDY)
            target.copy_(tensor)
            digests.append(tensor_digest(name, tensor))
        if wanted:
            raise UserError("weights", ", ".join(sorted(wanted)), "missing from the stream", _REMEDY)
        return combine_digests(digests)

    def new_slots(self, num_slots: int) -> SlotState:
        """An empty cache for ``num_slots`` answers."""
        config = self._config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        num_layers, num_heads = config.num_hidden_layers, config.num_key_value_heads
        return SlotState(num_layers, num_slots, num_heads, head_dim, self._dtype)

    @torch.inference_mode()
    def read(self, tokens_PS: torch.Tensor) -> torch.Tensor:
        """Keys and values ``[2, L, P, H, S, D]`` of right-padded prompts."""
        state = PromptState(self._config.num_hidden_layers)
        positions_PS = torch.arange(tokens_PS.shape[1]).expand(tokens_PS.shape)
        self._model.base_model(tokens_PS, position_ids=positions_PS, attention_state=state, use_cache=False)
        return state.key_values()

    @torch.inference_mode()
    def step(self, tokens_B: torch.Tensor, positions_B: torch.Tensor, num_tokens: int, slots: SlotState) -> torch.Tensor:
        """Feed each answer its last token, at ``positions_B`` < ``num_tokens``; return the next token's logits ``[B, V]``."""
        slots.prepare(positions_B, num_tokens)
        output = self._model(tokens_B[:, None], position_ids=positions_B[:, None], attention_state=slots, use_cache=False)
        return output.logits[:, 0]


def _as_in_files(name: str, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A parameter as files name it. transformers 5 stacks a layer's experts in two tensors; files name each expert's parts.

    >>> [(name, part.tolist()) for name, part in _as_in_files("mlp.experts.gate_up_proj", torch.arange(4).view(1, 4, 1))]
    [('mlp.experts.0.gate_proj.weight', [[0], [1]]), ('mlp.experts.0.up_proj.weight', [[2], [3]])]
    """
    kinds = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    prefix, found, kind = name.partition(".experts.")
    if not found or kind not in kinds:
        yield name, parameter
        return
    for number, expert in enumerate(parameter):
        for part, rows in zip(kinds[kind], expert.chunk(len(kinds[kind])), strict=True):
            yield f"{prefix}.experts.{number}.{part}.weight", rows


_REMEDY = "give the trainer's model and the engine's config.json the same architecture"
