"""The paper's comparison at toy scale: six algorithms, ω and ε, several seeds, one page.

    python examples/paper/compare.py --seeds 4                   everything, two runs beside each other
    python examples/paper/compare.py --seeds 4 --pilot           NFT and GRPO alone: times, deviations, what the rest can show
    python examples/paper/compare.py --seeds 4 --page-only       the page of what is there

A seed is a cold start, an order of questions and a stream of samples; all variants of a seed share it, so differences are
taken in pairs. Run it again after an interruption: finished runs are kept, others go on. Further arguments are overrides of
every run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from page import write_page
from variants import ALGORITHMS, EPSILON, OMEGA, UNFILTERED, folder_name

from nft_megatron.config_load import load_config

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Task:
    """One run: where, from which start, with which overrides."""

    folder: Path
    start: Path
    seed: int
    overrides: tuple[str, ...]

    def command(self, config: Path) -> list[str]:
        """What one could type."""
        own = (f"run_dir={self.folder}", f"seed={self.seed}", f"model.path={self.start / 'model'}")
        data = (f"data.train={self.start / 'train.parquet'}", f"evaluate.data={self.start / 'held_out.parquet'}")
        return [sys.executable, "-m", "nft_megatron", "train", str(config), *own, *data, *self.overrides]


def tasks(root: Path, seeds: int, variants: Mapping[str, tuple[str, ...]], config: Path, extra: list[str]) -> list[Task]:
    """Every variant with every seed, each folder once."""
    num_steps = load_config(config, extra).train.num_steps
    found: dict[Path, Task] = {}
    for seed in range(seeds):
        for name, overrides in variants.items():
            longer = (f"train.num_steps={2 * num_steps}",) if name in UNFILTERED else ()
            folder = root / f"seed{seed}" / folder_name(overrides)
            found[folder] = Task(folder, root / "start" / f"seed{seed}", seed, (*overrides, *extra, *longer))
    return list(found.values())


def run(task: Task, config: Path) -> None:
    """Train it to its end, its output beside it; an error ends the comparison."""
    task.folder.mkdir(parents=True, exist_ok=True)
    with (task.folder / "output.txt").open("w") as output:
        code = subprocess.run(task.command(config), stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        sys.exit(f"{task.folder} ended with {code}; its output.txt says why")
    print(f"done  {task.folder}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=2, help="runs beside each other (default: %(default)s)")
    parser.add_argument("--root", type=Path, default=Path("runs/paper"), help="folder of all runs (default: %(default)s)")
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    parser.add_argument("--pilot", action="store_true")
    parser.add_argument("--page-only", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(arguments)
    variants = {name: ALGORITHMS[name] for name in ("NFT", "GRPO")} if options.pilot else ALGORITHMS | OMEGA | EPSILON
    if not options.page_only:
        for seed in range(options.seeds):
            start = options.root / "start" / f"seed{seed}"
            if not start.exists():
                subprocess.run([sys.executable, HERE / "prepare.py", "--out", start, "--seed", str(seed)], check=True)
        with ThreadPoolExecutor(options.jobs) as pool:
            every = tasks(options.root, options.seeds, variants, options.config, options.overrides)
            for _ in pool.map(lambda task: run(task, options.config), every):
                pass
    answers_per_question = load_config(options.config, options.overrides).rollout.answers_per_question
    print(write_page(options.root, options.seeds, answers_per_question))


if __name__ == "__main__":
    main()
