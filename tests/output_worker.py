"""Runs ``nft-megatron`` with streams that lead elsewhere, in a process of tests/launcher.py."""

import os
import sys

from nft_megatron.cli.main import main


def _redirected(kind: str, number: int) -> None:
    if kind == "closed":
        os.close(number)
    elif kind == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)
    elif kind == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, number)


def main_with(out: str, err: str, words: list[str]) -> None:
    """``out`` and ``err``: kept, closed, full, pipe or ascii."""
    for kind, number, name in ((out, 1, "stdout"), (err, 2, "stderr")):
        _redirected(kind, number)
        if kind == "closed":
            setattr(sys, name, None)
        elif kind == "ascii":
            getattr(sys, name).reconfigure(encoding="ascii", errors="strict")
    main(words)
