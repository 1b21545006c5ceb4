"""What commands share: a description with examples, a configuration with overrides."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path

from nft_megatron.base.paths import expand


def describe(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], None],
    description: str,
    epilog: str | None = None,
) -> None:
    """Set the help of ``parser``, whose ``epilog`` is printed verbatim, and the function that runs its options."""
    parser.description, parser.epilog = textwrap.fill(description, 100), epilog
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(run=run)


def user_path(text: str) -> Path:
    """The type of every argument that is a path: ``~`` is expanded also where the shell does not, as in ``--out=~/a``."""
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_config(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """CONFIG and its overrides: ``options.config`` and ``options.overrides``."""
    if optional:
        parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file")
    else:
        parser.add_argument("config", metavar="CONFIG", type=user_path, help="YAML file")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="override the file's value; read as YAML")
