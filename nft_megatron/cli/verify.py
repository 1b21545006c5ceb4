"""``nft-megatron verify``."""

from __future__ import annotations

import argparse
from pathlib import Path

from nft_megatron.cli.arguments import describe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Help and arguments of this command."""
    describe(
        parser,
        _run,
        "Grade the answers in FILE (of any kind that data.train takes) and print a summary of the verdicts and reasons. If a "
        "row has a finish_reason, as in a run's ledger, length is wrong (simplerl: judged by its text) and abort is unknown.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="one answer per row")
    parser.add_argument("--answer-field", default="text", help="field with the whole answer (default: %(default)s)")
    parser.add_argument("--gold-field", default="gold", help="field with the right answer (default: %(default)s)")
    parser.add_argument("--mode", default="strict", help="strict, math-verify, dapo or simplerl (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the rows, each with verdict and reason, as JSONL to this file")
    parser.add_argument("--workers", type=int, help="grader processes (default: one per core)")


def _run(options: argparse.Namespace) -> None:
    from nft_megatron.evaluate.grade_file import verify_file

    verify_file(
        options.file,
        answer_field=options.answer_field,
        gold_field=options.gold_field,
        mode=options.mode,
        out=options.out,
        workers=options.workers,
    )
