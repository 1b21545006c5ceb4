"""What the examples that run a whole experiment share: they run commands that you could type, and print each."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
from pathlib import Path


def short(path: str | Path) -> Path:
    """``path`` as one would type it: relative if it is inside the current folder."""
    path = Path(path).absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def run(*command: object) -> None:
    """Print ``command`` and run it; end with its exit code if it fails."""
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(words)}", flush=True)
    process = subprocess.Popen(words)
    while process.poll() is None:
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C also reaches the command, which saves its work and exits
            process.wait()
    if process.returncode:
        sys.exit(process.returncode if process.returncode > 0 else 128 - process.returncode)


def print_accuracies(results: dict[str, Path]) -> None:
    """A table of the files that ``nft-megatron eval --out`` wrote."""
    width = max(20, *(len(name) + 1 for name in results))
    print(f"\n{'held-out questions':{width}} {'right':>16} {'tokens per answer':>18}")
    for name, path in results.items():
        result = json.loads(path.read_text())
        right = f"{result['accuracy']:.1%} ± {result['standard_error']:.1%}"
        print(f"{name:{width}} {right:>16} {result['answer_length_mean']:>18.1f}")
