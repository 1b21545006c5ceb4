"""``nft-megatron report``."""

from __future__ import annotations

import argparse

from nft_megatron.cli.arguments import describe, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Help and arguments of this command."""
    describe(
        parser,
        _run,
        "Write one self-contained HTML page: curves, timings, recorded answers with their verdicts.",
    )
    parser.add_argument("reported", metavar="RUN", type=user_path, help="run folder")  # not run_dir: see replay
    parser.add_argument("--out", type=user_path, help="the page (default: RUN/report.html)")
    parser.add_argument("--png", type=user_path, help="also write an overview picture to this file")


def _run(options: argparse.Namespace) -> None:
    from nft_megatron.observe.report import write_report

    print(write_report(options.reported, options.out))
    if options.png:
        from nft_megatron.observe.plots import write_overview_png

        drawn = write_overview_png(options.reported, options.png)
        print(drawn or f"{options.png}: not drawn, because no rollout step has finished yet")
