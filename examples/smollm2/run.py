"""A real language model learns from its own answers: prepare SmolLM2-135M, measure it, train it with NFT, measure it again.

It only runs commands that you could type, and prints each. Run it again after an interruption to resume. Arguments override
config.yaml, such as ``train.num_steps=4``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from nft_megatron.base.errors import UserError
from nft_megatron.config.load import load_config

sys.path.append(str(Path(__file__).resolve().parents[1]))
from commands import print_accuracies, run, short

START = Path("runs/smollm2/start")


def main(overrides: list[str]) -> None:
    """Run all commands in order."""
    began = time.monotonic()
    example, programs = short(Path(__file__).parent), short(Path(sys.executable).parent)
    python, nft_megatron, config = programs / "python", programs / "nft-megatron", example / "config.yaml"
    run_dir = load_config(config, overrides).run_dir
    results: dict[str, Path] = {}

    def measure(name: str, model: Path) -> None:
        """With the product's generator, and with transformers' own."""
        for by, command in {
            "": (nft_megatron, "eval", model, config, *overrides),
            ", by transformers": (python, example / "by_transformers.py", model, START / "held_out.parquet"),
        }.items():
            out = run_dir / f"{name.replace(' ', '_')}{'_by_transformers' if by else ''}.json"
            if not out.exists():
                run(*command, "--out", out)
            results[name + by] = out

    run(python, example / "prepare.py", "--out", START)
    measure("before", START / "model")
    run(nft_megatron, "train", config, *overrides)
    export = max((run_dir / "hf").glob("step_*"))
    measure(f"after {export.name}", export)  # more steps are measured anew
    run(nft_megatron, "report", run_dir, "--png", run_dir / "overview.png")

    print_accuracies(results)
    print(f"\nreport              {run_dir / 'report.html'}\nHugging Face model  {export}")
    print(f"took                {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"smollm2: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
