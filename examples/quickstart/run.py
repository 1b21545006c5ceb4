"""The quickstart: create a toy task, measure a small model, train it with NFT, measure it again, write the report.

It only runs commands that you could type, and prints each. Run it again after an interruption to resume. Arguments override
config.yaml, such as ``algorithm.name=rft``.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from nft_megatron.base.errors import UserError
from nft_megatron.config.load import load_config

START = Path("runs/quickstart/start")


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


def main(overrides: list[str]) -> None:
    """Run all commands in order."""
    began = time.monotonic()
    example, programs = short(Path(__file__).parent), short(Path(sys.executable).parent)
    python, nft_megatron, config = programs / "python", programs / "nft-megatron", example / "config.yaml"
    run_dir = load_config(config, overrides).run_dir
    before, after = run_dir / "before.json", run_dir / "after.json"

    run(python, example / "prepare.py", "--out", START)
    run(nft_megatron, "eval", START / "model", config, *overrides, "--out", before)
    run(nft_megatron, "train", config, *overrides)
    export = max((run_dir / "hf").glob("step_*"))
    run(nft_megatron, "eval", export, config, *overrides, "--out", after)
    run(nft_megatron, "report", run_dir, "--png", run_dir / "overview.png")

    print(f"\n{'held-out questions':20} {'right':>16} {'tokens per answer':>18}")
    for name, path in (("before", before), ("after NFT", after)):
        result = json.loads(path.read_text())
        right = f"{result['accuracy']:.1%} ± {result['standard_error']:.1%}"
        print(f"{name:20} {right:>16} {result['answer_length_mean']:>18.1f}")
    print(f"\nreport              {run_dir / 'report.html'}\nHugging Face model  {export}")
    print(f"took                {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
