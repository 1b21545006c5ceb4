"""``nft-megatron eval``."""

from __future__ import annotations

import argparse
from pathlib import Path

from nft_megatron.base.errors import UserError
from nft_megatron.cli.arguments import add_config, describe, user_path
from nft_megatron.config.load import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Help and arguments of this command."""
    describe(
        parser,
        _run,
        "With --benchmarks: avg@k with its standard error, pass@k and maj@k on AIME 2024, AIME 2025, AMC 2023, MATH500, "
        "OlympiadBench and Minerva Math, sampled and graded as in the paper. Every answer is kept in --out; the same command "
        "resumes where a killed one stopped. With CONFIG, prompts, answer length and run seed are those of the run. Without "
        "--benchmarks: accuracy on evaluate.data of CONFIG, under training's own verifier; answers are kept in --out too.",
        epilog="Examples\n"
        "  nft-megatron eval RUN/hf/step_000320 RUN/config.yaml --benchmarks data/benchmarks\n"
        "  nft-megatron eval Qwen2.5-Math-7B --benchmarks aime24.jsonl amc23.jsonl --samples 4 rollout.batch_size=64\n"
        "  nft-megatron overlap dapo.parquet --against data/benchmarks/*.jsonl --out overlap.jsonl\n"
        "  nft-megatron eval MODEL --benchmarks data/benchmarks --overlap overlap.jsonl --beside eval/base/summary.json\n\n"
        "Files: Parquet, JSONL, JSON, CSV or dataset folders. Those named aime24, aime25, amc23, math500, olympiadbench,\n"
        "minerva_math (or as on the hub: AIME_2024, MATH-500 …) are asked as in the paper, any other once and as it stands;\n"
        "--instruction and data.template change the prompts. docs/evaluation.md explains the numbers.\n\n"
        "Unless rollout.engine=vllm is set with servers (fleet.servers=4 …), the model decodes on the CPU.",
    )
    parser.add_argument("model", metavar="MODEL", type=user_path, help="Hugging Face model folder, such as RUN/hf/step_000100")
    parser.add_argument("--benchmarks", metavar="PATH", nargs="+", help="benchmark files, or folders that contain them")
    parser.add_argument(
        "--samples", metavar="K", type=int, help="answers per question (default: 32 on AIME and AMC, 1 on the others)"
    )
    parser.add_argument(
        "--temperature", type=float, help="sampling temperature (default: the paper's, 1 for 7B and 0.6 for 32B)"
    )
    parser.add_argument("--top-p", type=float, default=0.7, help="nucleus sampling (default: %(default)s)")
    parser.add_argument(
        "--max-answer-tokens", metavar="N", type=int, help="longest answer (default: rollout.max_answer_tokens)"
    )
    parser.add_argument(
        "--instruction",
        choices=("boxed", "answer", "keep", "none"),
        help="as data.instruction, for every question (default: AIME and AMC as in training, others as they stand)",
    )
    parser.add_argument("--grader", default="simplerl", help="a verify.mode, or a URL (default: %(default)s, as in the paper)")
    parser.add_argument(
        "--overlap",
        metavar="FILE",
        type=user_path,
        help="output of `overlap --out`; also report accuracy without those questions",
    )
    parser.add_argument(
        "--beside",
        metavar="FILE",
        type=user_path,
        nargs="+",
        default=[],
        help="summary.json of other models, or published scores, to show alongside",
    )
    parser.add_argument(
        "--out",
        type=user_path,
        help="folder for answers and summary.json (default: eval/MODEL); without --benchmarks also FILE.json",
    )
    add_config(parser, optional=True)


def _run(options: argparse.Namespace) -> None:
    # argparse cannot tell an override from a missing CONFIG or from one more benchmark
    words = [word for word in (options.config, *(options.benchmarks or [])) if word is not None]
    misplaced = [word for word in words if "=" in word and not user_path(word).exists()]
    overrides = [*misplaced, *options.overrides]
    config_path = None if options.config is None or options.config in misplaced else user_path(options.config)
    from nft_megatron.evaluate.folder import BenchmarkOptions, default_config, evaluate_benchmarks, evaluate_folder

    out = options.out or Path("eval") / options.model.resolve().name
    if options.benchmarks is None:
        if config_path is None:
            raise UserError("eval", options.model, "no questions to measure it on", "add --benchmarks FOLDER, or a CONFIG")
        evaluate_folder(load_config(config_path, overrides), options.model, out)
        return
    config = load_config(config_path, overrides) if config_path else default_config(options.model, out, overrides)
    chosen = BenchmarkOptions(
        paths=tuple(user_path(word) for word in options.benchmarks if word not in misplaced),
        out=out,
        samples=options.samples,
        temperature=options.temperature,
        top_p=options.top_p,
        max_answer_tokens=options.max_answer_tokens,
        grader=options.grader,
        overlap=options.overlap,
        beside=tuple(options.beside),
        instruction=options.instruction,
    )
    evaluate_benchmarks(config, options.model, chosen)
