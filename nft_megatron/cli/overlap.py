"""``nft-megatron overlap``."""

from __future__ import annotations

import argparse

from nft_megatron.cli.arguments import describe, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Help and arguments of this command."""
    describe(
        parser,
        _run,
        "List the evaluation questions at least half of whose word 13-grams occur in one training question. Words are "
        "lower-case runs of a to z or of digits, so that two typesettings of one problem agree; DAPO's instructions around a "
        "question are removed first. Files: Parquet, JSONL or dataset folders. `nft-megatron eval --overlap FILE` then "
        "shows every accuracy with and without the questions found.",
    )
    parser.add_argument("train", metavar="TRAIN", type=user_path, nargs="+", help="training questions")
    parser.add_argument("--against", metavar="EVAL", type=user_path, nargs="+", required=True, help="evaluation questions")
    parser.add_argument("--n", type=int, default=13, help="words in an n-gram (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.5, help="smallest share that counts (default: %(default)s)")
    parser.add_argument("--out", type=user_path, help="write the questions found, with their shares and sources, as JSONL")


def _run(options: argparse.Namespace) -> None:
    from nft_megatron.evaluate.overlap import report_overlap

    report_overlap(options.train, options.against, n=options.n, threshold=options.threshold, out=options.out)
