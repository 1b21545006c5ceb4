"""The questions of a run: read at its first start, and from then on those that it began with."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from nft_megatron.base.run_folder import RunFolder
from nft_megatron.collect.build import columns_of, read_prompts
from nft_megatron.config.schema import Config
from nft_megatron.config.yaml import read_sections
from nft_megatron.data.files import files_of
from nft_megatron.data.kept_prompts import KeptPrompts, digest_of
from nft_megatron.data.prompts import PromptSet
from nft_megatron.data.questions import TRAIN_SPLIT
from nft_megatron.data.start_table import start_table


def read_questions(config: Config, folder: RunFolder, tokenizer: Any) -> tuple[PromptSet, PromptSet]:
    """The prompts to train on and the held-out ones. Prints the table of what was read to stderr.

    A run that has begun keeps its prompts and the date in its templates as long as the data files have the same content. If
    they differ they are read anew, and the collector refuses prompts that are not those it began with. A run that version 0.1
    began has no prompts in its folder; it keeps the rules of that version.
    """
    kept = KeptPrompts.read(folder.prompts) if folder.has_begun else None
    now = kept.started if kept else datetime.now()
    is_v0_1 = kept.is_v0_1 if kept else folder.has_begun and _was_written_by_v0_1(folder.config)
    columns = columns_of(config, "data.train")
    digest = digest_of(
        file for path in config.data.train for file in files_of(path, "data.train", TRAIN_SPLIT, columns.config_name)
    )
    if kept and kept.digest == digest:
        questions = kept.prompts
    else:
        questions = read_prompts(config, tokenizer, "data.train", now, is_v0_1=is_v0_1)
    held_out = read_prompts(config, tokenizer, "evaluate.data", now, is_v0_1=is_v0_1)
    if kept is None:
        KeptPrompts(questions, now, digest, is_v0_1).write(folder.prompts)
    print(start_table(questions, tokenizer, "data.train"), file=sys.stderr, flush=True)
    return questions, held_out


def _was_written_by_v0_1(config: Path) -> bool:
    """Whether a run's record of its configuration has no field that came after version 0.1; the record has every field."""
    return "question_field" not in read_sections(config).get("data", {})
