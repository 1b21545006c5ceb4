"""``nft-megatron replay``."""

from __future__ import annotations

import argparse

from nft_megatron.cli.arguments import describe, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Help and arguments of this command."""
    describe(
        parser,
        _run,
        "Redo the updates of a recorded step, from its ledger and the checkpoint of the step before, and print how their "
        "metrics differ from the recorded ones. RUN is not written. Start it like training: one process, "
        "torchrun or srun.",
        epilog="Examples\n"
        "  nft-megatron replay RUN --step 12                                    bit-identical\n"
        "  nft-megatron replay RUN --step 12 --save one.safetensors\n"
        "  torchrun --nproc-per-node 2 -m nft_megatron replay RUN --step 12 --against one.safetensors parallel.tensor=2\n"
        "  nft-megatron replay RUN --step 12 --against one.safetensors algorithm.name=grpo\n",
    )
    parser.add_argument(
        "recorded", metavar="RUN", type=user_path, help="run folder"
    )  # not run_dir, in which faults are recorded
    parser.add_argument("--step", metavar="N", type=int, required=True, help="rollout step, counted from 1")
    parser.add_argument(
        "--save", metavar="FILE", type=user_path, help="write metrics and gradient of the first update (safetensors)"
    )
    parser.add_argument(
        "--against", metavar="FILE", type=user_path, help="compare with such a file instead of RUN/metrics.jsonl"
    )
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="override the run's value; read as YAML")


def _run(options: argparse.Namespace) -> None:
    from nft_megatron.run.replay import replay

    replay(options.recorded, options.step, options.overrides, options.save, options.against)
