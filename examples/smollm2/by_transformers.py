r"""Measures a model without nft_megatron: transformers' ``generate``, greedy, and each answer's last ``\boxed{integer}``.

    python examples/smollm2/by_transformers.py MODEL QUESTIONS.parquet --out RESULT.json

The result has the names that ``nft-megatron eval --out`` uses: accuracy, standard_error, answer_length_mean (tokens).
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

_BOX = re.compile(r"\\boxed\{(-?[0-9]+)\}")
_SYSTEM = {"role": "system", "content": "Work it out line by line."}  # data.system_prompt of config.yaml


@torch.inference_mode()
def answer(folder: Path, chats: list[list[dict[str, str]]], max_tokens: int, batch_size: int) -> list[tuple[str, int]]:
    """The greedy answer to every chat, and its length in tokens, the one that ends it included."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for start in range(0, len(chats), batch_size):
        chosen = [[_SYSTEM, *chat] for chat in chats[start : start + batch_size]]
        prompts = tokenizer.apply_chat_template(
            chosen, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**prompts, do_sample=False, max_new_tokens=max_tokens)
        for tokens in output[:, prompts["input_ids"].shape[1] :].tolist():
            end = tokens.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in tokens else len(tokens)
            answers.append((tokenizer.decode(tokens[:end], skip_special_tokens=True), end))
        print(f"\r{len(answers)} of {len(chats)} answered", end="", flush=True)
    print()
    return answers


def is_right(text: str, gold: str) -> bool:
    r"""Whether the last box holds ``gold``.

    >>> is_right("1 + 2 = 3\n\\boxed{3}", "3"), is_right("3", "3"), is_right("\\boxed{3} \\boxed{4}", "3")
    (True, False, False)
    """
    return _BOX.findall(text)[-1:] == [gold]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", type=Path)
    parser.add_argument("questions", metavar="QUESTIONS", type=Path)
    parser.add_argument("--out", metavar="FILE", type=Path, required=True)
    parser.add_argument(
        "--max-tokens", type=int, default=40, help="rollout.max_answer_tokens of config.yaml (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="questions at a time (default: %(default)s)")
    options = parser.parse_args()
    rows = pq.read_table(options.questions).to_pylist()
    answers = answer(options.model, [row["prompt"] for row in rows], options.max_tokens, options.batch_size)
    golds = [row["reward_model"]["ground_truth"] for row in rows]
    right = [is_right(text, gold) for (text, _), gold in zip(answers, golds, strict=True)]
    accuracy = sum(right) / len(right)
    result = {
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / len(right)),
        "answer_length_mean": sum(length for _, length in answers) / len(answers),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
