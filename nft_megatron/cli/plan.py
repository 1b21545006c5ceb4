"""``nft-megatron plan``."""

from __future__ import annotations

import argparse

from nft_megatron.cli.arguments import add_config, describe, user_path
from nft_megatron.config.load import load_config
from nft_megatron.plan.hardware import ACCELERATORS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Help and arguments of this command."""
    kinds = "\n".join(
        f"  {gpu.name:12}{gpu.flops / 1e12:6.0f} TFLOP/s  {gpu.memory / 1e9:4.0f} GB  {gpu.memory_bandwidth / 1e12:5.2f} TB/s  "
        f"{gpu.source}"
        for gpu in ACCELERATORS.values()
    )
    describe(
        parser,
        _run,
        "Plan a run of CONFIG: memory per rank by component, time per rollout step by part, and the "
        "layouts that fit. Parameters, gradients and optimizer are exact; activations and times are estimates from the "
        "GPU's published figures and the shares of them that runs are assumed to reach. model.path needs no weights: a folder "
        "with config.json, or the name of a public model such as models/Qwen2.5-32B. Exits with 2 if the run does not fit.",
        epilog="Examples\n"
        "  nft-megatron plan examples/qwen2.5-32b-16k/config.yaml\n"
        "  nft-megatron plan CONFIG --gpus 256                            twice the nodes, split as in CONFIG\n"
        "  nft-megatron plan CONFIG --layouts parallel.tensor=4 model.recompute=selective\n"
        "  nft-megatron plan CONFIG --answer-tokens 8000                  later in training, when answers are longer\n\n"
        "How to read it. Every pipeline stage has a memory row: the first stores the activations of most micro-batches, the\n"
        "last has the LM head. If it needs too much, set model.recompute, raise parallel.tensor or parallel.context, lower\n"
        "train.micro_batch_tokens to the longest sequence, or set optimizer.cpu_offload. If it is too slow, find the\n"
        "largest part of the step. If that is generation, move nodes from trainer_nodes to rollout_nodes; if communication,\n"
        "make tensor groups smaller; if the bubble, raise parallel.virtual_pipeline.\n\n"
        f"Kinds of GPU (bfloat16 without sparsity)\n{kinds}",
    )
    parser.add_argument("--gpus", metavar="N", type=int, help="total number of GPUs; overrides cluster.*_nodes")
    parser.add_argument("--gpu", metavar="KIND", help="overrides cluster.gpu")
    parser.add_argument("--layouts", action="store_true", help="try every layout: those that fit, and why others do not")
    parser.add_argument(
        "--answer-tokens", metavar="N", type=int, help="mean length of answers (default: a quarter of the limit)"
    )
    parser.add_argument(
        "--mixed-share",
        metavar="X",
        type=float,
        default=0.5,
        help="share of questions with both right and wrong answers (default: %(default)s)",
    )
    parser.add_argument(
        "--check", action="store_true", help="build the real model of every rank on the meta device and compare"
    )
    parser.add_argument("--json", metavar="FILE", type=user_path, help="also write the plan, in bytes and seconds")
    add_config(parser)


def _run(options: argparse.Namespace) -> None:
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
