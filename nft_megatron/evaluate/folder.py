"""``nft-megatron eval``: held-out accuracy of a Hugging Face model folder."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from nft_megatron.answering import open_asker, read_prompts, training_sampling
from nft_megatron.config import Config
from nft_megatron.errors import UserError
from nft_megatron.evaluate.run import evaluate
from nft_megatron.files import atomic_file
from nft_megatron.observe.metrics import PhaseTimer
from nft_megatron.observe.progress import open_progress
from nft_megatron.tokenizer import load_tokenizer
from nft_megatron.weights import read_shape, weight_table
from nft_megatron.weights.hf_reader import HFReader


def evaluate_folder(config: Config, model_folder: Path, out: Path | None) -> None:
    """Print the accuracy of ``model_folder`` on ``config.evaluate.data`` with its standard error; write it to ``out`` too.

    Raises :class:`UserError` when there are no held-out questions or the folder is not a whole model.
    """
    if not config.evaluate.data:
        raise UserError(
            "evaluate.data", "(nothing)", "no questions to evaluate on", "name a file: evaluate.data=questions.parquet"
        )
    table = weight_table(read_shape(model_folder, "MODEL"))
    tokenizer = load_tokenizer(model_folder, "MODEL")
    prompts = read_prompts(config, tokenizer, "evaluate.data").prompts
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(HFReader(model_folder, "MODEL"))
        reader.check(table)
        progress = stack.enter_context(open_progress(1))
        asker = open_asker(config, model_folder, tokenizer, stack, PhaseTimer(), progress)
        asker.engine.load(((name, reader.read(name, 0, 0, shape[0])) for name, shape in table.shapes.items()), version=0)
        result = evaluate(asker, prompts, config.evaluate, training_sampling(config, model_folder, tokenizer))
    summary = {
        "model": str(model_folder),
        "data": [str(path) for path in config.evaluate.data],
        "questions": len(prompts),
        "samples": config.evaluate.samples,
        "temperature": config.evaluate.temperature,
        "accuracy": result.accuracy,
        "standard_error": result.standard_error,
        "truncated_rate": result.truncated_rate,
        "unknown_rate": result.unknown_rate,
        "answer_length_mean": result.answer_length_mean,
    }
    if out is not None:
        with atomic_file(out) as temporary:
            temporary.write_text(json.dumps(summary, indent=2) + "\n")
    print(
        f"{model_folder}: {result.accuracy:.1%} ± {result.standard_error:.1%} of {len(prompts)} questions right "
        f"(avg@{config.evaluate.samples}, temperature {config.evaluate.temperature:g}), {result.truncated_rate:.1%} cut off"
    )
