"""``nft-megatron doctor``."""

from __future__ import annotations

import argparse

from nft_megatron.commands.arguments import describe
from nft_megatron.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Help and arguments of this command."""
    describe(
        parser, _run,
        "Look at the packages, the GPUs and the fast paths of this environment. Ends with 2 where something needed is missing.",
    )  # fmt: skip


def _run(options: argparse.Namespace) -> None:
    from nft_megatron.doctor import findings

    found = findings()
    names, states = max(len(finding.name) for finding in found), max(len(finding.state) for finding in found)
    for finding in found:
        mark = "✗" if finding.is_fault else "·" if finding.remedy else "✓"
        print(f"{mark} {finding.name:<{names}}  {finding.state:<{states}}  {finding.remedy}".rstrip())
    faults = [finding for finding in found if finding.is_fault]
    if faults:
        raise UserError("environment", faults[0].name, faults[0].state, faults[0].remedy)
