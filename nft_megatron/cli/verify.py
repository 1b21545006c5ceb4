"""``nft-megatron verify``."""

from __future__ import annotations

import argparse

from nft_megatron.cli.arguments import describe, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Help and arguments of this command."""
    describe(
        parser,
        _run,
        "Grade the answers in each FILE, of any kind that data.train takes, and print a summary of the verdicts and "
        "reasons. If a row has a finish_reason, as in a run's ledger, length is wrong (simplerl: judged by its text) and "
        "abort is unknown. For a ledger it also says which recorded verdicts have changed.",
    )
    parser.add_argument("files", metavar="FILE", type=user_path, nargs="+", help="one answer per row")
    parser.add_argument(
        "--answer-field", help="field with the whole answer (default: text, response, completion, output, answer)"
    )
    parser.add_argument("--gold-field", help="field with the right answer (default: gold, ground_truth, final_answer, answer)")
    parser.add_argument(
        "--mode",
        default="strict",
        help="strict, math-verify, dapo, simplerl, published-boxed, published-answer, module:function or a URL "
        "(default: %(default)s)",
    )
    parser.add_argument("--out", type=user_path, help="write the rows, each with verdict and reason, as JSONL to this file")
    parser.add_argument("--workers", type=int, help="grader processes (default: one per core)")


def _run(options: argparse.Namespace) -> None:
    from nft_megatron.evaluate.grade_file import verify_file

    verify_file(
        *options.files,
        answer_field=options.answer_field,
        gold_field=options.gold_field,
        mode=options.mode,
        out=options.out,
        workers=options.workers,
    )
