"""The paper's comparison at toy scale: six algorithms, ω and ε, several seeds, one page.

    python examples/paper/compare.py --seeds 6                   everything, two runs at a time
    python examples/paper/compare.py --seeds 4 --pilot           NFT and GRPO only: times, deviations, what the rest can show
    python examples/paper/compare.py --seeds 6 --page-only       only the page, from the finished runs

A seed is a cold start, an order of questions and a stream of samples; all variants of a seed share these, so differences
are paired. Run it again after an interruption: finished runs are kept, others resume. Further arguments override settings of
every run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from variants import ALGORITHMS, EPSILON, OMEGA, UNFILTERED, WEIGHT, folder_name

from nft_megatron.cli.main import main as nft_megatron
from nft_megatron.config.load import load_config

HERE = Path(__file__).resolve().parent
FORKS = multiprocessing.get_context("forkserver")
PRELOAD = ["nft_megatron.train", "nft_megatron.rollout.decode", "transformers.models.qwen2.modeling_qwen2"]
"""Imported once for all runs, which saves each about 8 s."""


@dataclass(frozen=True)
class Task:
    """One run: its folder, its start and its overrides."""

    folder: Path
    start: Path
    seed: int
    overrides: tuple[str, ...]

    def command(self, config: Path) -> list[str]:
        """The arguments of ``nft-megatron``."""
        own = (f"run_dir={self.folder}", f"seed={self.seed}", f"model.path={self.start / 'model'}")
        data = (f"data.train={self.start / 'train.parquet'}", f"evaluate.data={self.start / 'held_out.parquet'}")
        return ["train", str(config), *own, *data, *self.overrides]


def tasks(root: Path, seeds: int, variants: Mapping[str, tuple[str, ...]], config: Path, extra: list[str]) -> list[Task]:
    """Every variant with every seed, each folder once."""
    base = load_config(config, extra)
    longer = (f"train.num_steps={2 * base.train.num_steps}", f"evaluate.every={2 * base.evaluate.every}")
    found: dict[Path, Task] = {}
    for seed in range(seeds):
        for name, overrides in variants.items():
            folder, steps = root / f"seed{seed}" / folder_name(overrides), longer if name in UNFILTERED else ()
            found[folder] = Task(folder, root / "start" / f"seed{seed}", seed, (*overrides, *extra, *steps))
    return list(found.values())


def run(task: Task, config: Path) -> None:
    """Train it to its end, with its output in its folder; an error ends the comparison."""
    task.folder.mkdir(parents=True, exist_ok=True)
    process = FORKS.Process(target=_train, args=(task.command(config), task.folder / "output.txt"))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{task.folder} exited with {process.exitcode}; its output.txt says why")
    print(f"done  {task.folder}", flush=True)


def _train(command: list[str], output: Path) -> None:
    with output.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    print("$ nft-megatron", *command, flush=True)
    nft_megatron(command)


def prepare(start: Path, seed: int) -> None:
    """Create the cold start of ``seed`` unless it exists."""
    if not start.exists():
        subprocess.run([sys.executable, HERE / "prepare.py", "--out", start, "--seed", str(seed)], check=True)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--root", type=Path, default=Path("runs/paper"), help="folder of all runs (default: %(default)s)")
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    parser.add_argument("--pilot", action="store_true")
    parser.add_argument("--page-only", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(arguments)
    variants = {name: ALGORITHMS[name] for name in ("NFT", "GRPO")} if options.pilot else ALGORITHMS | OMEGA | EPSILON | WEIGHT
    if not options.page_only:
        FORKS.set_forkserver_preload(PRELOAD)
        every = tasks(options.root, options.seeds, variants, options.config, options.overrides)
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(prepare, *zip(*{task.start: (task.start, task.seed) for task in every}.values(), strict=True)))
            list(pool.map(lambda task: run(task, options.config), every))
    from page import write_page  # imports matplotlib, which no run needs

    config = load_config(options.config, options.overrides)
    command = f"python examples/paper/compare.py --seeds {options.seeds}"
    settings = ", ".join([f"settings of [{options.config.name}]({options.config.name})", *options.overrides])
    print(write_page(options.root, options.seeds, config.rollout.group_size, command, settings))


if __name__ == "__main__":
    main()
