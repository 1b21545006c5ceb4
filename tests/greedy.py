"""Greedy answers of a trained tiny model, from transformers' own ``generate``."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM


def greedy_accuracy(folder: Path) -> float:
    """Accuracy of the exported model in transformers on the sums of conftest's question_file."""
    model, tokenizer = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    sums = [(a, b) for a in range(5) for b in range(5 - a)]
    right = []
    for a, b in sums:
        ids = torch.tensor([tokenizer(f"What is {a} + {b}\n").input_ids])
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        ended = int(answer[-1]) in model.generation_config.eos_token_id
        right.append(ended and tokenizer.decode(answer.tolist()).endswith(f"\\boxed{{{a + b}}}"))
    return float(np.mean(right))
