"""``nft-megatron init``."""

from __future__ import annotations

import argparse
from pathlib import Path

from nft_megatron.cli.arguments import describe, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Help and arguments of this command."""
    describe(
        parser,
        _run,
        "Write a first configuration for a model and a file of questions: the prompt template, lengths and sizes that fit the "
        "two, and the paper's values for the rest. It prints three prompts as the model will see them.",
        epilog="Examples\n"
        "  nft-megatron init models/Qwen2.5-Math-7B data/dapo.parquet\n"
        "  nft-megatron init MODEL questions.jsonl --out small.yaml data.answer_field=final rollout.group_size=8\n",
    )
    parser.add_argument("model", metavar="MODEL", type=user_path, help="Hugging Face model folder")
    parser.add_argument("data", metavar="DATA", type=user_path, help="questions, of any kind that data.train takes")
    parser.add_argument("--out", type=user_path, default=Path("config.yaml"), help="the file to write (default: %(default)s)")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="written as given; read as YAML")


def _run(options: argparse.Namespace) -> None:
    from nft_megatron.run.starter import write_starter

    write_starter(options.model, options.data, options.out, options.overrides)
