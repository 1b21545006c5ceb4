"""The command ``nft-megatron``. Heavy packages are imported only by the command that needs them."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from nft_megatron import __version__
from nft_megatron.config_load import config_help, load_config
from nft_megatron.errors import EXIT_STOPPED_EARLY, StoppedEarly, UserError
from nft_megatron.place import place

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and end the process.

    0 done, 2 wrong input, 75 stopped early with everything saved, 130 interrupted, 1 a fault.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    options = _parse(arguments)
    code = _run(options)
    sys.stdout.flush()
    sys.stderr.flush()
    if code and "torch" in sys.modules:
        os._exit(code)  # after a failure, process groups that are still open would abort the interpreter's own exit
    sys.exit(code)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse does not find CONFIG and overrides behind an option (``eval MODEL --out FILE CONFIG a.b=1``): take them over."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and getattr(options, "config", rest) is None and "=" not in rest[0] and not rest[0].startswith("-"):
        options.config = rest.pop(0)
    if rest and not (hasattr(options, "overrides") and all("=" in word and not word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _run(options: argparse.Namespace) -> int:
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except (UserError, StoppedEarly) as ending:
        _say(ending)
        return ending.exit_code
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on from the last checkpoint")
        return 128 + signal.SIGINT
    except Exception as error:
        full = _disk_full(error)
        if full is not None:
            _say(f"{full.filename or 'run_dir'}: {full.strerror}; free some space and run the same command again")
            return EXIT_STOPPED_EARLY
        _write_fault(options)
        raise
    return 0


def _say(message: object) -> None:
    """To standard error, once: of all ranks only the first speaks."""
    if place().rank == 0:
        print(f"nft-megatron: {message}", file=sys.stderr)


def _disk_full(error: BaseException | None) -> OSError | None:
    """The "no space left" at the root of ``error``, if that is what it is."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


def _write_fault(options: argparse.Namespace) -> None:
    """Leave the cause of a fault in the run folder, one file a rank."""
    run_dir: Path | None = getattr(options, "run_dir", None)
    if run_dir is not None and run_dir.is_dir():
        (run_dir / "logs").mkdir(exist_ok=True)
        (run_dir / "logs" / f"fault_rank{place().rank}.txt").write_text(traceback.format_exc())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nft-megatron",
        description="Train language models on their own verified answers (NFT, arXiv 2505.18116) on Megatron-Core.",
        epilog="Exit codes: 0 done; 2 the input is wrong; 75 stopped early with everything saved, run again to go on.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = _add(
        commands, "train", _train, "train, or go on with a run",
        "Train from CONFIG until train.num_steps. Starting again with the same run_dir goes on from the newest checkpoint. "
        "One process, or several: torchrun --nproc-per-node N -m nft_megatron train CONFIG (torchrun itself ends with 1 "
        "whenever a rank ends with another code than 0).",
        epilog="CONFIG is YAML with the sections and fields below.\n\n" + config_help(),
    )  # fmt: skip
    _add_config(train)
    _add_plan(commands)

    evaluate = _add(
        commands, "eval", _eval, "measure a Hugging Face model folder on benchmarks or held-out questions",
        "With --benchmarks: avg@k with its standard error, pass@k and maj@k on AIME 2024, AIME 2025, AMC 2023, MATH500, "
        "OlympiadBench and Minerva Math, sampled and graded as in the paper. Every answer is kept in --out; the same command "
        "goes on where a killed one was. With CONFIG, prompts, answer length and run seed are those of the run. Without "
        "--benchmarks: accuracy on evaluate.data of CONFIG, under training's own verifier.",
        epilog="Examples\n"
        "  nft-megatron eval RUN/hf/step_000320 RUN/config.yaml --benchmarks data/benchmarks\n"
        "  nft-megatron eval Qwen2.5-Math-7B --benchmarks aime24.jsonl amc23.jsonl --samples 4 rollout.batch_size=64\n"
        "  nft-megatron overlap dapo.parquet --against data/benchmarks/*.jsonl --out overlap.jsonl\n"
        "  nft-megatron eval MODEL --benchmarks data/benchmarks --overlap overlap.jsonl --beside eval/base/summary.json\n\n"
        "The files: Parquet, JSONL or data set folders, named aime24, aime25, amc23, math500, olympiadbench, minerva_math\n"
        "(or as on the hub: AIME_2024, MATH-500 …). docs/evaluation.md explains the numbers.",
    )  # fmt: skip
    evaluate.add_argument("model", metavar="MODEL", type=Path, help="Hugging Face model folder, such as RUN/hf/step_000100")
    evaluate.add_argument("--benchmarks", metavar="PATH", nargs="+", help="files of benchmarks, or folders that hold them")
    evaluate.add_argument(
        "--samples", metavar="K", type=int, help="answers a question (default: 32 on AIME and AMC, 1 on the others)"
    )
    evaluate.add_argument("--temperature", type=float, help="of sampling (default: the paper's, 1 for 7B and 0.6 for 32B)")
    evaluate.add_argument("--top-p", type=float, default=0.7, help="of sampling (default: %(default)s)")
    evaluate.add_argument("--max-answer-tokens", metavar="N", type=int, help="(default: rollout.max_answer_tokens)")
    evaluate.add_argument("--grader", default="simplerl", help="a verify.mode (default: %(default)s, as in the paper)")
    evaluate.add_argument("--overlap", metavar="FILE", type=Path, help="from `overlap --out`: also without those questions")
    evaluate.add_argument(
        "--beside", metavar="FILE", type=Path, nargs="+", default=[], help="summary.json of other models, or published scores"
    )
    evaluate.add_argument(
        "--out", type=Path, help="folder for answers and summary.json (default: eval/MODEL); without --benchmarks a JSON file"
    )
    _add_config(evaluate, optional=True)

    _add(
        commands, "doctor", _doctor, "what is installed, which fast paths are on, how to get what is missing",
        "Look at the packages, the GPUs and the fast paths of this environment. Ends with 2 where something needed is missing.",
    )  # fmt: skip

    overlap = _add(
        commands, "overlap", _overlap, "find evaluation questions that are in the training data",
        "List the evaluation questions of which one training question holds at least half of the word 13-grams. Words are runs "
        "of a to z and of digits, in lower case, so that two typesettings of one problem agree; DAPO's instructions around a "
        "question are taken off first. Files: Parquet, JSONL or data set folders. `nft-megatron eval --overlap FILE` then "
        "shows every accuracy with and without the questions found.",
    )  # fmt: skip
    overlap.add_argument("train", metavar="TRAIN", type=Path, nargs="+", help="training questions")
    overlap.add_argument("--against", metavar="EVAL", type=Path, nargs="+", required=True, help="evaluation questions")
    overlap.add_argument("--n", type=int, default=13, help="words in an n-gram (default: %(default)s)")
    overlap.add_argument("--threshold", type=float, default=0.5, help="smallest share that counts (default: %(default)s)")
    overlap.add_argument("--out", type=Path, help="write the questions found, with their shares and sources, as JSONL")

    verify = _add(
        commands, "verify", _verify, "grade a file of answers",
        "Grade the answers in FILE (JSONL or Parquet) and print how the verdicts came about. A row with a finish_reason of "
        "length or abort, as in the ledger of a run, counts as cut off.",
    )  # fmt: skip
    verify.add_argument("file", metavar="FILE", type=Path, help="one answer a row")
    verify.add_argument("--answer-field", default="text", help="field with the whole answer (default: %(default)s)")
    verify.add_argument("--gold-field", default="gold", help="field with the right answer (default: %(default)s)")
    verify.add_argument("--mode", default="strict", help="strict, math-verify, dapo or simplerl (default: %(default)s)")
    verify.add_argument("--out", type=Path, help="write the rows, each with verdict and reason, as JSONL to this file")
    verify.add_argument("--workers", type=int, help="grader processes (default: one a core)")

    report = _add(
        commands, "report", _report, "write the page of a run",
        "Write one self-contained HTML page: curves, timings, recorded answers with their verdicts.",
    )  # fmt: skip
    report.add_argument("run_dir", metavar="RUN", type=Path, help="run folder")
    report.add_argument("--out", type=Path, help="the page (default: RUN/report.html)")
    report.add_argument("--png", type=Path, help="also write an overview picture to this file")

    _add_convert(commands)
    return parser


def _add_plan(commands) -> None:  # type: ignore[no-untyped-def]
    from nft_megatron.plan.hardware import ACCELERATORS

    kinds = "\n".join(
        f"  {gpu.name:12}{gpu.flops / 1e12:6.0f} TFLOP/s  {gpu.memory / 1e9:4.0f} GB  {gpu.memory_bandwidth / 1e12:5.2f} TB/s  "
        f"{gpu.source}"
        for gpu in ACCELERATORS.values()
    )
    plan = _add(
        commands, "plan", _plan, "memory, time and layouts of a run, before it starts",
        "What a run of CONFIG will need: the memory of every rank by component, the time of a rollout step by its parts, the "
        "layouts that fit. Parameters, gradients and optimizer are exact; activations and times are estimates, made from the "
        "GPU's published figures and the shares of them that runs are assumed to reach. model.path needs no weights: a folder "
        "with config.json, or the name of a public model such as models/Qwen2.5-32B. Ends with 2 where the run does not fit.",
        epilog="Examples\n"
        "  nft-megatron plan examples/qwen2.5-32b-16k/config.yaml\n"
        "  nft-megatron plan CONFIG --gpus 256                            twice the nodes, split as in CONFIG\n"
        "  nft-megatron plan CONFIG --layouts parallel.tensor=4 model.recompute=selective\n"
        "  nft-megatron plan CONFIG --answer-tokens 8000                  later in training, when answers are longer\n\n"
        "How to read it. Every pipeline stage has a row of memory: the first keeps the activations of most micro-batches, the\n"
        "last has the LM head. Too much: set model.recompute, raise parallel.tensor or parallel.context, lower\n"
        "train.micro_batch_tokens to the longest sequence, or give optimizer.cpu_offload a share. Too slow: look for the\n"
        "largest part of the step. If it is generating, move nodes from trainer_nodes to rollout_nodes; if communication,\n"
        "make tensor groups smaller; if the bubble, raise parallel.virtual_pipeline.\n\n"
        f"Kinds of GPU (bfloat16 without sparsity)\n{kinds}",
    )  # fmt: skip
    plan.add_argument("--gpus", metavar="N", type=int, help="this many in all, in place of cluster.*_nodes")
    plan.add_argument("--gpu", metavar="KIND", help="in place of cluster.gpu")
    plan.add_argument("--layouts", action="store_true", help="try every layout: those that fit, and why others do not")
    plan.add_argument("--answer-tokens", metavar="N", type=int, help="mean length of answers (default: a quarter of the limit)")
    plan.add_argument(
        "--mixed-share", metavar="X", type=float, default=0.5,
        help="of the questions, those with right and wrong answers (default: %(default)s)",
    )  # fmt: skip
    plan.add_argument("--check", action="store_true", help="build the real model of every rank on the meta device and compare")
    plan.add_argument("--json", metavar="FILE", type=Path, help="also write the plan, in bytes and seconds")
    _add_config(plan)


def _add_convert(commands) -> None:  # type: ignore[no-untyped-def]
    convert = commands.add_parser("convert", help="Hugging Face folders to Megatron checkpoints and back, proven complete")
    directions = convert.add_subparsers(required=True, metavar="to-megatron|to-hf|check")

    into = _add(
        directions, "to-megatron", _to_megatron, "write a Hugging Face folder as a torch_dist checkpoint",
        "Write the Hugging Face folder SRC as a torch_dist checkpoint DST, which Megatron-Core loads under any layout. DST "
        "appears when it is whole; an interrupted conversion goes on when started again.",
    )  # fmt: skip
    back = _add(
        directions, "to-hf", _to_hf, "write a Megatron checkpoint as a Hugging Face folder",
        "Write the weights of the Megatron checkpoint SRC (torch_dist under any layout, or mp_rank_XX_YYY folders) as the "
        "Hugging Face folder DST. DST appears when it is whole; an interrupted conversion goes on when started again.",
    )  # fmt: skip
    back.add_argument("--max-shard-bytes", type=float, default=5e9, help="largest safetensors file (default: %(default).0e)")
    check = _add(
        directions, "check", _check, "compare two checkpoints of any format, bit by bit",
        "Compare every tensor of A and B, and each with the manifest that its conversion left. Ends with 2 where anything is "
        "missing, unexpected, different, damaged or not finite.",
    )  # fmt: skip
    check.add_argument("--prompt", help="also compare the log-probs of this text under both, by transformers in float32")
    for command, first, second in ((into, "SRC", "DST"), (back, "SRC", "DST"), (check, "A", "B")):
        command.add_argument("first", metavar=first, type=Path)
        command.add_argument("second", metavar=second, type=Path)
        command.add_argument("--workers", type=int, help="threads (default: one a core, at most 8)")
    for command in (back, check):
        command.add_argument("--model", type=Path, help="folder with config.json and tokenizer, where SRC has none")
    for command in (into, back):
        command.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="cast; otherwise dtypes are kept")
        command.add_argument("--dry-run", action="store_true", help="print the mapping table and write nothing")
        command.add_argument("--strict", action="store_true", help="refuse NaN and infinity; otherwise they are reported")


def _add(commands, name, function, short, description, epilog=None) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    parser = commands.add_parser(
        name,
        help=short,
        description=textwrap.fill(description, 100),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=function)
    return parser


def _add_config(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    if optional:
        parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file")
    else:
        parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="in place of the file's value, read as YAML")


def _train(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    options.run_dir = config.run_dir
    from nft_megatron.train import train

    train(config)


def _plan(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    from nft_megatron.plan.command import plan_run
    from nft_megatron.plan.workload import Assumptions

    plan = plan_run(
        config,
        Assumptions(options.answer_tokens, options.mixed_share),
        gpus=options.gpus,
        kind=options.gpu,
        with_layouts=options.layouts,
        json_path=options.json,
    )
    if options.check:
        from nft_megatron.model.meta import check_plan

        print(f"\n{check_plan(plan, config.model.dtype)}")


def _eval(options: argparse.Namespace) -> None:
    # argparse cannot tell an override from a missing CONFIG or from one more benchmark
    words = [word for word in (options.config, *(options.benchmarks or [])) if word is not None]
    misplaced = [word for word in words if "=" in word and not Path(word).exists()]
    overrides = [*misplaced, *options.overrides]
    config_path = None if options.config is None or options.config in misplaced else Path(options.config)
    from nft_megatron.evaluate.folder import BenchmarkOptions, default_config, evaluate_benchmarks, evaluate_folder

    if options.benchmarks is None:
        if config_path is None:
            raise UserError("eval", options.model, "nothing to measure it on", "add --benchmarks FOLDER, or a CONFIG")
        evaluate_folder(load_config(config_path, overrides), options.model, options.out)
        return
    out = options.out or Path("eval") / options.model.resolve().name
    config = load_config(config_path, overrides) if config_path else default_config(options.model, out, overrides)
    chosen = BenchmarkOptions(
        paths=tuple(Path(word) for word in options.benchmarks if word not in misplaced),
        out=out,
        samples=options.samples,
        temperature=options.temperature,
        top_p=options.top_p,
        max_answer_tokens=options.max_answer_tokens,
        grader=options.grader,
        overlap=options.overlap,
        beside=tuple(options.beside),
    )
    evaluate_benchmarks(config, options.model, chosen)


def _doctor(options: argparse.Namespace) -> None:
    from nft_megatron.doctor import findings

    found = findings()
    names, states = max(len(finding.name) for finding in found), max(len(finding.state) for finding in found)
    for finding in found:
        mark = "✗" if finding.is_fault else "·" if finding.remedy else "✓"
        print(f"{mark} {finding.name:<{names}}  {finding.state:<{states}}  {finding.remedy}".rstrip())
    faults = [finding for finding in found if finding.is_fault]
    if faults:
        raise UserError("environment", faults[0].name, faults[0].state, faults[0].remedy)


def _overlap(options: argparse.Namespace) -> None:
    from nft_megatron.evaluate.overlap import report_overlap

    report_overlap(options.train, options.against, n=options.n, threshold=options.threshold, out=options.out)


def _verify(options: argparse.Namespace) -> None:
    from nft_megatron.verify.command import verify_file

    verify_file(
        options.file, answer_field=options.answer_field, gold_field=options.gold_field, mode=options.mode, out=options.out,
        workers=options.workers,
    )  # fmt: skip


def _report(options: argparse.Namespace) -> None:
    from nft_megatron.observe.report import write_report

    print(write_report(options.run_dir, options.out))
    if options.png:
        from nft_megatron.observe.plots import write_overview_png

        print(write_overview_png(options.run_dir, options.png))


def _to_megatron(options: argparse.Namespace) -> None:
    from nft_megatron.convert.commands import to_megatron

    to_megatron(
        options.first, options.second, dtype=options.dtype, workers=options.workers,
        dry_run=options.dry_run, strict=options.strict,
    )  # fmt: skip


def _to_hf(options: argparse.Namespace) -> None:
    from nft_megatron.convert.commands import to_hf

    to_hf(
        options.first, options.second, model=options.model, dtype=options.dtype, workers=options.workers,
        max_shard_bytes=int(options.max_shard_bytes), dry_run=options.dry_run, strict=options.strict,
    )  # fmt: skip


def _check(options: argparse.Namespace) -> None:
    from nft_megatron.convert.commands import check

    check(options.first, options.second, model=options.model, prompt=options.prompt, workers=options.workers)
