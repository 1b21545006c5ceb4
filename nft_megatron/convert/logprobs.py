"""Log-probs of one prompt under two checkpoints, by transformers in float32."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from nft_megatron.base.errors import UserError
from nft_megatron.convert.checkpoint import Problem
from nft_megatron.weights.hf_reader import INDEX, SINGLE

TOLERANCE = 1e-4
_NOTHING_FOREIGN = {"trust_remote_code": False, "local_files_only": True}


def compare_log_probs(a: Path, b: Path, prompt: str, convert: Callable[[Path, Path], None]) -> list[Problem]:
    """Print the largest difference; a problem if it exceeds ``TOLERANCE``. Holds one model at a time.

    ``convert(path, folder)`` writes a Megatron checkpoint as a Hugging Face folder.

    Raises:
        UserError: if the prompt has fewer than two tokens, or a folder has no tokenizer.
    """
    first, second = (_log_probs(path, prompt, convert) for path in (a, b))
    if first.shape != second.shape:
        return [Problem("log-probs", "prompt", f"has {len(first) + 1} tokens in A, {len(second) + 1} in B")]
    worst = float((first - second).abs().max())
    print(f"log-probs of {len(first)} tokens: largest difference {worst:.2e}, sum {float(first.sum()):.4f} in A")
    if not worst <= TOLERANCE:
        return [Problem("log-probs", "prompt", f"differ by {worst:.2e}")]
    return []


@torch.no_grad()
def _log_probs(path: Path, prompt: str, convert: Callable[[Path, Path], None]) -> torch.Tensor:
    """Log-probs of every token of the prompt except the first."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="nft-megatron-") as temporary:
        folder = path
        if not ((path / SINGLE).is_file() or (path / INDEX).is_file()):
            folder = Path(temporary) / "hf"
            convert(path, folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **_NOTHING_FOREIGN)
        except (OSError, ValueError) as error:
            raise UserError("--prompt", folder, f"has no tokenizer ({error})", "omit --prompt, or add one") from error
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        if tokens.shape[1] < 2:
            raise UserError("--prompt", prompt, "has fewer than two tokens", "give a longer one")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **_NOTHING_FOREIGN)
        logits = model(tokens).logits
        return logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
