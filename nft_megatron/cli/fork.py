"""``nft-megatron fork``."""

from __future__ import annotations

import argparse

from nft_megatron.cli.arguments import describe, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Help and arguments of this command."""
    describe(
        parser,
        _run,
        "Create a new run in the folder NEW that begins from the checkpoint of a step of RUN: its weights, its optimizer, its "
        "numbering of steps, and whatever settings are given. RUN stays as it is. A run itself cannot change its meaning when "
        "it is resumed; its fork can.",
        epilog="Examples\n"
        "  nft-megatron fork runs/a runs/b --step 120 algorithm.name=grpo\n"
        "  nft-megatron fork runs/a runs/c optimizer.learning_rate=5e-7 train.num_steps=400\n"
        "  nft-megatron train runs/b/config.yaml\n\n"
        "If data, rollout, seed, model.path or the verifier change, the new run begins with its first question; else it goes\n"
        "on in the order of RUN.\n",
    )
    parser.add_argument("recorded", metavar="RUN", type=user_path, help="run folder")
    parser.add_argument("target", metavar="NEW", type=user_path, help="folder of the new run")
    parser.add_argument("--step", metavar="N", type=int, help="a step that has a checkpoint (default: the newest)")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="override the run's value; read as YAML")


def _run(options: argparse.Namespace) -> None:
    from nft_megatron.run.fork import fork

    fork(options.recorded, options.target, options.step, options.overrides)
