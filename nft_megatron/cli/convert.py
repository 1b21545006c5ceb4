"""``nft-megatron convert``: to-megatron, to-hf, check."""

from __future__ import annotations

import argparse

from nft_megatron.cli.arguments import describe, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Help and arguments of this command."""
    directions = parser.add_subparsers(required=True, metavar="to-megatron|to-hf|check")

    into = directions.add_parser("to-megatron", help="write a Hugging Face folder as a torch_dist checkpoint")
    describe(
        into,
        _to_megatron,
        "Write the Hugging Face folder SRC as a torch_dist checkpoint DST, which Megatron-Core loads under any layout. DST "
        "appears once complete; run an interrupted conversion again to resume it.",
    )
    back = directions.add_parser("to-hf", help="write a Megatron checkpoint as a Hugging Face folder")
    describe(
        back,
        _to_hf,
        "Write the weights of the Megatron checkpoint SRC (torch_dist under any layout, or mp_rank_XX_YYY folders) as the "
        "Hugging Face folder DST. DST appears once complete; run an interrupted conversion again to resume it.",
    )
    back.add_argument("--max-shard-bytes", type=float, default=5e9, help="largest safetensors file (default: %(default).0e)")
    check = directions.add_parser("check", help="compare two checkpoints of any format, bit by bit")
    describe(
        check,
        _check,
        "Compare every tensor of A and B, and each with its conversion's manifest. Exits with 2 if anything is "
        "missing, unexpected, different, damaged or not finite.",
    )
    check.add_argument("--prompt", help="also compare the log-probs of this text under both, by transformers in float32")
    for command, first, second in ((into, "SRC", "DST"), (back, "SRC", "DST"), (check, "A", "B")):
        command.add_argument("first", metavar=first, type=user_path)
        command.add_argument("second", metavar=second, type=user_path)
        command.add_argument("--workers", type=int, help="threads (default: one per core, at most 8)")
    for command in (back, check):
        command.add_argument("--model", type=user_path, help="folder with config.json and tokenizer, if SRC has none")
    for command in (into, back):
        command.add_argument(
            "--dtype", choices=("bfloat16", "float16", "float32"), help="cast to this dtype (default: keep dtypes)"
        )
        command.add_argument("--dry-run", action="store_true", help="print the mapping table and write nothing")
        command.add_argument("--strict", action="store_true", help="refuse NaN and infinity (default: report them)")
        command.add_argument(
            "--no-proof", dest="proof", action="store_false", help="neither hash nor search for NaN; the manifest then says so"
        )


def _to_megatron(options: argparse.Namespace) -> None:
    from nft_megatron.convert.commands import to_megatron

    to_megatron(
        options.first,
        options.second,
        dtype=options.dtype,
        workers=options.workers,
        dry_run=options.dry_run,
        strict=options.strict,
        proof=options.proof,
    )


def _to_hf(options: argparse.Namespace) -> None:
    from nft_megatron.convert.commands import to_hf

    to_hf(
        options.first,
        options.second,
        model=options.model,
        dtype=options.dtype,
        workers=options.workers,
        max_shard_bytes=int(options.max_shard_bytes),
        dry_run=options.dry_run,
        strict=options.strict,
        proof=options.proof,
    )


def _check(options: argparse.Namespace) -> None:
    from nft_megatron.convert.commands import check

    check(options.first, options.second, model=options.model, prompt=options.prompt, workers=options.workers)
