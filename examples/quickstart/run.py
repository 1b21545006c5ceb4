"""The quickstart: create a toy task, measure a small model, train it with NFT, measure it again, write the report.

It only runs commands that you could type, and prints each. Run it again after an interruption to resume. Arguments override
config.yaml, such as ``algorithm.name=rft``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from nft_megatron.base.errors import UserError
from nft_megatron.config.load import load_config

sys.path.append(str(Path(__file__).resolve().parents[1]))
from commands import print_accuracies, run, short

START = Path("runs/quickstart/start")


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

    print_accuracies({"before": before, "after NFT": after})
    print(f"\nreport              {run_dir / 'report.html'}\nHugging Face model  {export}")
    print(f"took                {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
