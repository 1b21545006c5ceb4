"""Creates the quickstart's questions, tokenizer and starting model, a tiny Qwen2 that answers about 40 % of them correctly.

    DIR/model/             a Hugging Face model folder: config.json, model.safetensors, generation_config.json, the tokenizer
    DIR/train.parquet      questions to train on, with DAPO-Math-17k's schema
    DIR/held_out.parquet   questions to measure on; never trained on, not even in the cold start

The model starts from random weights and imitates demonstrations (arithmetic.py says of what) for a fixed number of updates:
the "cold start". DIR appears complete or not at all; if it already exists, nothing is done.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from arithmetic import Sum, answer_text, draw_distinct, draw_sum, question_text
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from nft_megatron.base.atomic_io import atomic_folder

NUM_TRAIN, NUM_HELD_OUT = 3000, 400

PAD, END, USER, ASSISTANT = "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# AutoTokenizer gives every folder of model type qwen2 this way of splitting text into words; every digit is a word.
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
VOCABULARY_SIZE = 320

CARELESS_SHARE = 0.7
HIDDEN_SIZE = 96
NUM_UPDATES = 1200
DEMONSTRATIONS_PER_UPDATE = 32
PEAK_LEARNING_RATE = 5e-3
WARMUP_UPDATES = 50
IGNORED = -100  # label of a token without a loss, as transformers has it


def make_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in the manner of Qwen2's, trained on ``corpus``; any text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int = HIDDEN_SIZE) -> Qwen2ForCausalLM:
    """A Qwen2 of random parameters, 0.25 million of them at the default size."""
    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden_size,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,  # about 1 / sqrt(hidden_size); the 0.02 of large models makes this one learn twice as slowly
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def write_questions(path: Path, tasks: list[Sum]) -> None:
    """Write Parquet with DAPO-Math-17k's schema."""
    rows = [
        {
            "data_source": "quickstart_arithmetic",
            "prompt": [{"role": "user", "content": question_text(task)}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(task.result), "style": "rule"},
            "extra_info": {"index": f"{path.stem}/{number}"},
        }
        for number, task in enumerate(tasks)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def draw_demonstrations(rng: random.Random, count: int, avoid: Collection[Sum]) -> list[tuple[Sum, str]]:
    """``count`` questions, none of them in ``avoid``, and their answers: careless with probability ``CARELESS_SHARE``."""
    demonstrations: list[tuple[Sum, str]] = []
    while len(demonstrations) < count:
        task = draw_sum(rng)
        if task not in avoid:
            demonstrations.append((task, answer_text(task, careless=rng.random() < CARELESS_SHARE)))
    return demonstrations


def make_batch(tokenizer: PreTrainedTokenizerFast, demonstrations: list[tuple[Sum, str]]) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``labels``, both [demonstrations, longest], padded on the right; only answers carry a loss."""
    chats = [[{"role": "user", "content": question_text(task)}] for task, _ in demonstrations]
    prompts = tokenizer(tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True))["input_ids"]
    answers = tokenizer([answer + END for _, answer in demonstrations])["input_ids"]
    rows = [(prompt + answer, [IGNORED] * len(prompt) + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(len(tokens) for tokens, _ in rows)
    pad: int = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([tokens + [pad] * (longest - len(tokens)) for tokens, _ in rows]),
        "labels": torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]),
    }


def learning_rate(update: int, num_updates: int) -> float:
    """Linear warm-up, then linear decay to a tenth of the peak."""
    return PEAK_LEARNING_RATE * min((update + 1) / WARMUP_UPDATES, 1 - 0.9 * update / num_updates)


def cold_start(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    held_out: Collection[Sum],
    num_updates: int,
) -> None:
    """Train ``model`` in place to imitate demonstrations."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    columns = (
        TextColumn("cold start"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=num_updates)
        for update in range(num_updates):
            demonstrations = draw_demonstrations(rng, DEMONSTRATIONS_PER_UPDATE, held_out)
            loss = model(**make_batch(tokenizer, demonstrations)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(update, num_updates)
            optimizer.step()
            optimizer.zero_grad()
            progress.update(bar, advance=1, description=f"loss {loss.item():.3f}")


def prepare(folder: Path, seed: int, num_updates: int = NUM_UPDATES, hidden_size: int = HIDDEN_SIZE) -> None:
    """Create ``folder``; the top of this file lists its content."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    held_out = draw_distinct(rng, NUM_HELD_OUT)
    train = draw_distinct(rng, NUM_TRAIN, avoid=held_out)
    tokenizer = make_tokenizer([text for task in train for text in (question_text(task), answer_text(task))])
    model = make_model(tokenizer, hidden_size)
    cold_start(model, tokenizer, rng, set(held_out), num_updates)
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary / "model")
        tokenizer.save_pretrained(temporary / "model")
        write_questions(temporary / "train.parquet", train)
        write_questions(temporary / "held_out.parquet", held_out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to create")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of questions, weights and demonstrations (default: %(default)s)"
    )
    parser.add_argument(
        "--hidden-size",
        type=int,
        default=HIDDEN_SIZE,
        help="hidden size, in 4 heads (default: %(default)s; vLLM on the CPU needs heads of 32 or more: 128)",
    )
    parser.add_argument("--updates", type=int, default=NUM_UPDATES, help="updates of the cold start (default: %(default)s)")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    if options.out.exists():
        print(f"{options.out} already exists; delete it to create it again")
        return
    prepare(options.out, options.seed, options.updates, options.hidden_size)
    print(f"wrote {options.out}: model, {NUM_TRAIN} questions to train on, {NUM_HELD_OUT} held out")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")
