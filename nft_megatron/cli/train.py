"""``nft-megatron train``."""

from __future__ import annotations

import argparse

from nft_megatron.cli.arguments import add_config, describe
from nft_megatron.config.load import config_help, load_config
from nft_megatron.run.environment import export_environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Help and arguments of this command."""
    describe(
        parser,
        _run,
        "Train from CONFIG until train.num_steps. Run again with the same run_dir to resume from the newest checkpoint. "
        "One process, or several: torchrun --nproc-per-node N -m nft_megatron train CONFIG (torchrun itself exits with 1 "
        "whenever a rank exits with a code other than 0).",
        epilog="CONFIG is YAML with the sections and fields below.\n\n" + config_help(),
    )
    add_config(parser)


def _run(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    options.run_dir = config.run_dir
    export_environment(config)  # before torch is imported
    from nft_megatron.train import train

    train(config)
